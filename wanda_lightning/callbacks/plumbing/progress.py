"""Progress on the terminal; and after a SIGTERM an end between two layers."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from wanda_lightning.report.environment import peak_memory
from wanda_lightning.report.tables import in_bytes
from wanda_lightning.terminal import columns, track


class StageBar(RichProgressBar):
    """Lightning's bar in the form of our others: one line for each stage, without a number of epochs that is none."""

    @property
    @override
    def validation_description(self) -> str:
        """What an evaluation is called."""
        return "Evaluation"

    @override
    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return what a bar shows; Lightning adds the metrics."""
        assert self._console is not None
        return columns(self._console)

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or 1
        return f"Training, epoch {current_epoch + 1} of {epochs}" if epochs > 1 else self.train_description


def progress(trainer: Trainer, asked_to_end: Callable[[], bool], layers: Iterable[Any], total: int) -> Iterator[Any]:
    """Pass layers on, and show how many have been, on the first process and where the Trainer shows its progress.

    Args:
        trainer: The Trainer.
        asked_to_end: Tells whether this process was asked to end, see :func:`noticing_sigterm`.
        layers: The layers.
        total: How many there are.

    Yields:
        The layers.

    Raises:
        SIGTERMException: Between two layers, if a process was asked to end: what is finished is on disk.
    """
    if trainer.progress_bar_callback and trainer.is_global_zero:
        layers = track(layers, total, "Pruning", "layers", _memory)
    for layer in layers:
        _end_if(asked_to_end, trainer)
        yield layer
    _end_if(asked_to_end, trainer)


@contextmanager
def noticing_sigterm() -> Iterator[Callable[[], bool]]:
    """Note a SIGTERM, as from SLURM, instead of ending at once; Lightning does so only when ``on_fit_start`` is over.

    Yields:
        A function that tells whether there was one.
    """
    seen: list[int] = []
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if callable(before):
            before(number, frame)

    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield lambda: False
        return
    signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_if(asked_to_end: Callable[[], bool], trainer: Trainer) -> None:
    if trainer.strategy.reduce_boolean_decision(asked_to_end(), all=False):  # all processes end, or none
        raise SIGTERMException(143)


def _memory() -> str:
    peaks = peak_memory()
    return in_bytes([*peaks.values()][-1]) if peaks else ""  # of a GPU, if there is one
