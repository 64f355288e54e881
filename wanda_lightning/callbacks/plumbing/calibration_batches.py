"""Where a pruning callback gets its calibration batches from, which are this process's, and how much they hold."""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DistributedSampler

from wanda_lightning.arguments import is_whole, plain, whole_number
from wanda_lightning.calibration.batches import count
from wanda_lightning.callbacks.plumbing.loaders import (
    Hook,
    as_it_is,
    datamodule_of,
    drawing_nothing,
    each_batch,
    loaders_in,
    starts_anew,
)
from wanda_lightning.callbacks.plumbing.module_step import hooks_of
from wanda_lightning.callbacks.plumbing.run_identity import describe_calibration
from wanda_lightning.engine.processes import Processes
from wanda_lightning.model.replaced import replaced

log = logging.getLogger(__name__)


class CalibrationBatches:
    """The calibration batches of a run, counted as they pass.

    They come from the ``calibration_dataloader()`` of the datamodule or of the module, else from the train dataloader.
    Either may be several loaders. If a train dataloader can be read only once, the batches that were read are given
    back to training. They pass through the hooks of datamodule and module, as for training.

    Args:
        num_samples: How many sequences to take from a train dataloader, >= 1; also beyond ``limit_train_batches``, but
            not if it can be read only once.

    Raises:
        ValueError: If ``num_samples`` is out of range.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = plain(num_samples)
        whole_number("num_samples", self.num_samples, 1)
        self._source: str | None = None
        self._sequences = self._tokens = 0

    def of(self, trainer: Trainer, own_step: bool = False) -> Iterator[Any]:
        """Return this process's share of the calibration batches.

        Args:
            trainer: The Trainer, in ``fit``.
            own_step: Whether a step of the module is called with them, for which they pass through its hooks then.

        Returns:
            An iterator over them, which counts what it gives.

        Raises:
            ValueError: If there are fewer batches than processes, or a train dataloader can be read only once and
                ``training_step`` reads it by itself.
        """
        self._sequences = self._tokens = 0
        hooks = as_it_is if own_step else hooks_of(trainer)
        for owner in (datamodule_of(trainer), trainer.lightning_module):
            if hasattr(owner, "calibration_dataloader"):
                self._source = f"{type(owner).__name__}.calibration_dataloader()"
                return self._counted(_share(cast(Any, owner).calibration_dataloader(), trainer, hooks))
        self._source = "train dataloader"
        return self._first(trainer, -(-self.num_samples // trainer.world_size), hooks)

    def describe(self, trainer: Trainer) -> dict[str, Any]:
        """Say where the batches of all processes came from, how much was asked for, and how much they held.

        Too few sequences are a warning. To be called by every process.

        Args:
            trainer: The Trainer. What its datamodule says of itself by ``describe()`` comes first.

        Returns:
            ``source``, ``num_samples`` (sequences asked for), ``sequences``, ``tokens`` (padding does not count), and
            what the datamodule adds. Where nothing was calibrated, only what the datamodule says.
        """
        told = describe_calibration(trainer)
        if self._source is None:
            return told
        counts = Processes().gather((self._sequences, self._tokens))
        sequences, tokens = (sum(each) for each in zip(*counts, strict=True))
        own = told.get("num_samples")
        asked = own if is_whole(own, 1) else self.num_samples
        if trainer.is_global_zero:
            log.log(
                logging.WARNING if sequences < asked else logging.INFO,
                "calibrated with %d sequences (%s) from %s; num_samples asks for %d",
                sequences,
                f"{tokens} tokens" if tokens else "of no token ids",
                self._source,
                asked,
            )
        used = {"sequences": sequences, **({"tokens": tokens} if tokens else {})}
        return {"source": self._source, "num_samples": asked, **told, **used}

    def _counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            sequences, tokens = count(batch)
            self._sequences += sequences
            self._tokens += tokens
            yield batch

    def _first(self, trainer: Trainer, sequences: int, hooks: Hook) -> Iterator[Any]:
        """Return whole batches of the train dataloader, until they hold so many sequences."""
        with replaced(trainer, "limit_train_batches", trainer.limit_train_batches or 1.0):
            trainer.fit_loop.setup_data()  # which otherwise comes later, or never; distributed loaders are sharded here
        combined = cast(CombinedLoader, trainer.fit_loop._combined_loader)
        items: Iterable[Any]
        if all(map(starts_anew, combined.flattened)):
            items = drawing_nothing(CombinedLoader(combined.iterables, combined._mode), combined.flattened)
        else:
            items = _read_ahead(trainer.fit_loop._data_fetcher, combined, sequences)
        return self._until(sequences, each_batch(items, combined, hooks))

    def _until(self, sequences: int, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in self._counted(batches):
            yield batch
            if self._sequences >= sequences:
                return


def _read_ahead(fetcher: Any, combined: CombinedLoader, sequences: int) -> list[Any]:
    """Return the items that training will read next, up to so many sequences, and let training read them too.

    They are kept with the fetcher: when a schedule prunes for the last time, there may be nothing left to read.
    """
    if not hasattr(fetcher, "batches"):
        raise ValueError(
            "this train dataloader may be one that can be read only once, and a training_step with dataloader_iter "
            "reads it by itself: give the datamodule or the module a calibration_dataloader()"
        )
    kept: dict[int, list[Any]] = fetcher.__dict__.setdefault("read_for_calibration", {})
    if sequences not in kept:
        items: list[Any] = []
        held = 0
        while held < sequences and not fetcher.done:
            items.append(next(fetcher))
            held += sum(max(count(batch)[0], 1) for batch in each_batch(items[-1:], combined))  # texts are not counted
        fetcher.batches[:0] = items
        fetcher.fetched -= len(items)
        fetcher.done = not fetcher.batches
        kept[sequences] = items
    return kept[sequences]


def _share(loader: Any, trainer: Trainer, hooks: Hook = as_it_is) -> Iterator[Any]:
    """Return this process's share of a loader, of several one after the other, or of a CombinedLoader in its mode."""
    first, every = trainer.global_rank, trainer.world_size
    loaders = loader.flattened if isinstance(loader, CombinedLoader) else loaders_in(loader)
    if all(isinstance(getattr(one, "sampler", None), DistributedSampler) for one in loaders or [loader]):
        first, every = 0, 1  # they are shared already
    if isinstance(loader, CombinedLoader):
        loader, hooks = each_batch(loader, loader, hooks), as_it_is
    elif loaders is not None:
        loader = chain.from_iterable(loaders)
    if hasattr(loader, "__len__") and 0 < len(loader) < every:
        raise ValueError(
            f"{len(loader)} calibration batches cannot be shared by {trainer.world_size} processes: use more "
            "samples, a smaller calibration_batch_size, or fewer devices"
        )
    return map(hooks, _every(loader, first, every))


def _every(loader: Any, first: int, step: int) -> Iterator[Any]:
    yield from islice(loader, first, None, step)  # begun when it is read: a loader draws a random number then
