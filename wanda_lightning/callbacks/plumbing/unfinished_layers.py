"""Finished layers of a pruning that is not through: kept on disk, so that after a crash the same run goes on there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer

from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.processes import Processes


class UnfinishedLayers:
    """Finished layers in a folder of their own in a run's folder.

    Args:
        folder: The run's folder.
        keep: True keeps them, locks the folder for this run, and goes on behind those that are there. False deletes
            those that are there.
        until_saved: Whether they are kept until the model is saved, rather than until ``fit`` ends.
        name: Of their folder.
    """

    def __init__(self, folder: Path, keep: bool, until_saved: bool = False, name: str = "unfinished") -> None:
        self.keep, self.until_saved = keep, until_saved
        self._journal = Journal(folder / name)

    def journal(self, streamed: bool = False) -> Journal | None:
        """Return where layers are recorded, or None; layers of a model that is on disk always are."""
        return self._journal if self.keep or streamed else None

    def open(self, trainer: Trainer) -> None:
        """Keep other runs out of the folder, or delete what an earlier run left there."""
        with Processes().together():
            if trainer.is_global_zero:
                (self._journal.lock if self.keep else self._journal.remove)()

    def release(self) -> None:
        """Let others go on with what is finished."""
        self._journal.release()

    def forget(self, trainer: Trainer) -> None:
        """Delete the layers: the model is saved, or nobody asked for them."""
        with Processes().together():
            if trainer.is_global_zero:
                self._journal.remove()


@contextmanager
def keeping_layers(
    trainer: Trainer, folder: Path, resume: Sequence[bool | None]
) -> Iterator[list[dict[str, Journal | None]]]:
    """Keep what several callbacks finish until all are through; what a run that failed has finished stays there.

    Args:
        trainer: The Trainer.
        folder: The run's folder.
        resume: Of each callback, whether its layers are kept, or those that are there deleted; None: neither.

    Yields:
        Of each callback, the argument ``journal``, if it takes one.
    """
    kept = {
        number: UnfinishedLayers(folder, keep, name=f"unfinished-{number}")
        for number, keep in enumerate(resume)
        if keep is not None
    }
    try:
        for layers in kept.values():
            layers.open(trainer)
        yield [{"journal": kept[number].journal()} if number in kept else {} for number in range(len(resume))]
        for layers in kept.values():
            layers.forget(trainer)
    finally:
        for layers in kept.values():
            layers.release()
