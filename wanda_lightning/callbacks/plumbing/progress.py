"""A progress bar over the decoder layers; and after a SIGTERM an end between two of them."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


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
        from rich.progress import track

        layers = track(layers, description="Pruning", total=total)
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
