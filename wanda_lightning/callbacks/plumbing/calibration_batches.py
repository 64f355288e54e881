"""Where a pruning callback gets its calibration batches from, and which of them are this process's."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, cast

from lightning.pytorch import Trainer
from torch import Tensor


def calibration_batches(trainer: Trainer, num_samples: int) -> Iterator[Any]:
    """Yield this process's share of the calibration batches.

    They come from the ``calibration_dataloader()`` of the datamodule or of the module, else from the train dataloader.

    Args:
        trainer: The Trainer, in ``fit``.
        num_samples: How many sequences to take from a train dataloader.

    Raises:
        ValueError: If there are fewer batches than processes.
    """
    for source in (getattr(trainer, "datamodule", None), trainer.lightning_module):
        if hasattr(source, "calibration_dataloader"):
            batches = cast(Any, source).calibration_dataloader()
            if hasattr(batches, "__len__") and 0 < len(batches) < trainer.world_size:
                raise ValueError(
                    f"{len(batches)} calibration batches cannot be shared by {trainer.world_size} processes: use more "
                    "samples, a smaller calibration_batch_size, or fewer devices"
                )
            return islice(iter(batches), trainer.global_rank, None, trainer.world_size)
    limit, trainer.limit_train_batches = trainer.limit_train_batches, trainer.limit_train_batches or 1.0
    try:  # the train dataloader is otherwise made later, or never; distributed ones are sharded here
        trainer.fit_loop.setup_data()
    finally:
        trainer.limit_train_batches = limit
    return _first_sequences(cast(Any, trainer.train_dataloader), -(-num_samples // trainer.world_size))


def _first_sequences(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield whole batches until they hold ``count`` sequences."""
    for batch in batches:
        if count <= 0:
            return
        yield batch
        ids = batch["input_ids"] if isinstance(batch, dict) else batch
        count -= len(ids) if isinstance(ids, Tensor) else len(ids[0])
