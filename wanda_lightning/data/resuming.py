"""A shuffled dataloader that goes on where a checkpoint left it, in the middle of an epoch too."""

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler
from typing_extensions import override


class ShuffledByEpoch(RandomSampler):
    """A random order of the rows for each epoch. It depends only on the seed and the epoch's number.

    Args:
        rows: The rows to sample from.
        seed: Seed of the order.
    """

    def __init__(self, rows: Sized, seed: int) -> None:
        super().__init__(rows, generator=torch.Generator().manual_seed(seed))
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch; Lightning calls this before each."""
        self.epoch = epoch
        self.generator.manual_seed(self.seed + epoch)


class ResumableLoader(DataLoader):
    """Tells checkpoints how far into an epoch it is, by the two methods that Lightning looks for.

    Its sampler has an ``epoch``, as :class:`ShuffledByEpoch` and torch's ``DistributedSampler`` do. With one that has
    none, such as that of Lightning's ``overfit_batches``, every epoch starts from the beginning.
    """

    # Not set in __init__: to shard a dataloader, Lightning makes it anew from DataLoader's arguments.
    _taken: int = 0
    _resume: dict[str, Any] = {}

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of an epoch, or those of them that a checkpoint left."""
        resume, self._resume = self._resume, {}
        same = self._epoch is not None and resume.get("epoch") == self._epoch
        self._taken = resume["batches"] if same else 0
        for batch in islice(super().__iter__(), self._taken, None):
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, and how many batches of it were taken."""
        return {"epoch": self._epoch, "batches": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration skip the batches that were taken, if it is of the same epoch."""
        self._resume = state

    @property
    def _epoch(self) -> int | None:
        return getattr(self.sampler, "epoch", None)
