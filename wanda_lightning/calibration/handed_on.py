"""Whether the layers of a model hand something on to later ones, beside the hidden states.

Such as the choice of tokens that a layer attends to (DeepSeek's sparse attention), the state of a router, or the values
of the first layer. What a model computes by itself, such as masks and positions, does not depend on its layers.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.calls import Arguments, hidden_states_of, rebuilt, split
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.model.replaced import replaced


class _LastLayerReachedError(Exception):
    """What follows the layers need not run."""


def hand_on(feed: Feed, layers: list[nn.Module], batch: Batch) -> bool:
    """Tell whether what a model passes to its layers depends on what they give.

    The model runs twice on a small part of a batch with stand-ins for its layers, which give zeros and ones.

    Args:
        feed: Runs the model.
        layers: Layers that it calls one after another.
        batch: A calibration batch.

    Returns:
        Whether a tensor among the arguments of a layer, behind the first one, was different.
    """
    few = feed.first(batch)
    given: list[Any] = []
    return not _same(_arguments(feed, layers, few, 0, given), _arguments(feed, layers, few, 1, given))


def _arguments(feed: Feed, layers: list[nn.Module], batch: Batch, fill: int, given: list[Any]) -> list[Arguments]:
    """Return what enters the layers beside the hidden states, if each gives so many everywhere.

    What they give is shaped like what the first one gives; that is kept in ``given``.
    """
    found: list[Arguments] = []

    def stand_in(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if index == 0 and not given:
                given.append(forward(*args, **kwargs))
                hidden_states_of(given[0])  # which refuses what else a layer may give
            found.append(split(args, kwargs)[1])
            if index + 1 == len(layers):
                raise _LastLayerReachedError
            return _filled(given[0], fill)

        return call

    with ExitStack() as stack, suppress(_LastLayerReachedError):
        for index, layer in enumerate(layers):
            stack.enter_context(replaced(layer, "forward", stand_in(index, layer.forward)))
        feed.run(batch)
    return found[1:]


def _filled(out: Any, fill: int) -> Any:
    if isinstance(out, Tensor):
        return torch.full_like(out, fill)
    return rebuilt(out, [_filled(part, fill) for part in out]) if isinstance(out, tuple | list) else out


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)
