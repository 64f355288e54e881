"""How far a pruning is: a bar over the decoder layers, and an end between two of them."""

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


def progress(trainer: Trainer, layers: Iterable[Any], total: int) -> Iterator[Any]:
    """Pass layers on, and show how many have been, on the first process and where the Trainer shows its progress.

    Args:
        trainer: The Trainer.
        layers: What to pass on.
        total: How many there are.

    Raises:
        SIGTERMException: Between two layers, if the process was asked to end: what is finished is on disk.
    """
    if trainer.progress_bar_callback and trainer.is_global_zero:
        from rich.progress import track

        layers = track(layers, description="Pruning", total=total)
    for layer in layers:
        if trainer.received_sigterm:
            raise SIGTERMException(143)
        yield layer
