"""Where a run has its data from, and dataloaders as Lightning takes them: one, or several, or a CombinedLoader."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

Hook = Callable[[Any], Any]
"""What is done to a batch."""


def as_it_is(batch: Any) -> Any:
    """Do nothing to a batch."""
    return batch


def datamodule_of(trainer: Any) -> Any:
    """Return the datamodule of this run, if it has one; a Trainer remembers that of an earlier run, too."""
    datamodule = getattr(trainer, "datamodule", None)
    is_of_this_run = datamodule is not None and trainer._evaluation_loop._data_source.instance is datamodule
    return datamodule if is_of_this_run else None


def loaders_in(collection: Any) -> list[Any] | None:
    """Return the loaders of a list, tuple or dict of loaders; None where it is something else, such as batches."""
    parts = [*collection.values()] if isinstance(collection, Mapping) else collection
    if not isinstance(parts, list | tuple) or not parts:
        return None
    found: list[Any] = []
    for part in parts:
        if isinstance(part, list | tuple | Mapping):
            inner = loaders_in(part)
            if inner is None:
                return None
            found += inner
        elif isinstance(part, Iterable) and not isinstance(part, Tensor | str):
            found.append(part)
        else:
            return None
    return found


def each_batch(items: Iterable[Any], combined: CombinedLoader, hooks: Hook = as_it_is) -> Iterator[Any]:
    """Take apart what a CombinedLoader yields into the batches of its single loaders.

    Args:
        items: A batch of every loader, an index and the number of a loader: what iterating over ``combined`` yields.
        combined: The loader. Sequentially it yields batches of single loaders; in the other modes a list or dict of
            them, and None in place of those of a loader that has ended.
        hooks: Done to what it yields, before that is taken apart.

    Yields:
        The batches, one by one.
    """
    for item, _, _ in items:
        batch = hooks(item)
        parts = [batch] if combined._mode == "sequential" else _parts(batch, combined.iterables)
        yield from (part for part in parts if part is not None)


def starts_anew(loader: Any) -> bool:
    """Tell whether a loader can certainly be read once more without taking batches from others that read it.

    A generator can be read only once. So can many iterable data sets, and nothing tells which. Persistent workers have
    one iterator for all: if it starts anew, it does so for every reader.
    """
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return indexed and not loader.persistent_workers


def drawing_nothing(items: Iterable[Any], loaders: Iterable[DataLoader]) -> Iterator[Any]:
    """Pass on what loaders yield, and leave the generators of their orders as they are found.

    Args:
        items: What is read; to its end, or until nobody holds it any more.
        loaders: The loaders that draw for it.

    Yields:
        The items.
    """
    drawers: list[Any] = [each for loader in loaders for each in (loader, loader.sampler, loader.batch_sampler)]
    drawers += [getattr(each, "sampler", None) for each in drawers]
    found = {each.generator for each in drawers if isinstance(getattr(each, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in found]
    try:
        yield from items
    finally:
        for generator, state in states:
            generator.set_state(state)


def _parts(batch: Any, loaders: Any) -> Iterator[Any]:
    """Take a batch apart as the loaders are; one in which a hook has put them together is one batch."""
    if isinstance(loaders, Mapping) and isinstance(batch, Mapping) and batch.keys() == loaders.keys():
        for name, loader in loaders.items():
            yield from _parts(batch[name], loader)
    elif isinstance(loaders, list | tuple) and isinstance(batch, list | tuple) and len(batch) == len(loaders):
        for part, loader in zip(batch, loaders, strict=True):
            yield from _parts(part, loader)
    else:
        yield batch
