"""Whether the layers of a model hand something on to later ones, beside the hidden states.

Such as the choice of tokens that a layer attends to (DeepSeek's sparse attention), the state of a router, or the values
of the first layer. What a model computes by itself, such as masks and positions, does not depend on its layers.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.call_order import is_passed_on
from wanda_lightning.calibration.calls import (
    Arguments,
    called,
    hidden_states_of,
    is_the_same,
    of_another,
    rebuilt,
    split,
)
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.calibration.stand_ins import EnoughSeenError, LayerForward, standing_in


class Probed(NamedTuple):
    """What a small part of a batch has shown.

    Attributes:
        given: What the first layer gives for it.
        arguments: What enters each layer beside the hidden states, twice: layers may write to it.
    """

    given: Any
    arguments: tuple[list[Arguments], list[Arguments]]


def probe(feed: Feed, layers: list[nn.Module], batch: Batch) -> Probed | None:
    """Find what may stand in for what layers give while it is recorded what the model passes to them.

    The model runs twice on a small part of a batch with stand-ins for its layers, which give random numbers in the
    shape of what the first one gives. What it passes to a layer may not differ, and not be other hidden states.

    Args:
        feed: Runs the model.
        layers: Layers that it calls one after another.
        batch: A calibration batch.

    Returns:
        What was seen; None where something is handed on, or happens to the hidden states on their way, or no layer is
        called.

    Raises:
        ValueError: If the first layer changes in place what enters it, or gives no hidden states.
    """
    few = feed.first(batch)
    given: list[Any] = []
    one, other = (_arguments(feed, layers, few, given, seed) for seed in (1, 2))
    if one is None or other is None or not _same(one[1:], other[1:]):
        return None
    return Probed(given[0], (one, other))


def _arguments(
    feed: Feed, layers: list[nn.Module], batch: Batch, given: list[Any], seed: int
) -> list[Arguments] | None:
    """Return what enters each layer beside the hidden states; None where these are not what the layer before gave.

    ``given`` keeps what the first layer gives.
    """
    found: list[Arguments] = []
    passed: list[Tensor] = []

    def stand_in(index: int, forward: LayerForward) -> LayerForward:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = split(args, kwargs)
            if not given:
                given.append(called(forward, hidden, args, kwargs))
            if passed and not is_passed_on(passed.pop(), hidden):
                found.clear()
                raise EnoughSeenError
            found.append(arguments)
            if index + 1 == len(layers):
                raise EnoughSeenError
            out = _random(given[0], torch.Generator().manual_seed(seed))
            passed.append(hidden_states_of(out))
            return out

        return call

    with standing_in(layers, stand_in), suppress(EnoughSeenError):
        feed.run(batch)
    return found or None


def check_one_by_one(layers: list[nn.Module], probed: Probed, hidden: Tensor, expected: Tensor) -> None:
    """Make sure that layers give what they give in the model if each is called for one batch after the other.

    Args:
        layers: Layers that the model calls one after another.
        probed: What is known of them.
        hidden: What enters the first one in the model, for the same part of a batch, shape (B, T, D).
        expected: What the last one gives there, shape (B, T, D).

    Raises:
        ValueError: If they do not.
    """
    for layer, own, others in zip(layers, *probed.arguments, strict=True):
        other = of_another(hidden)
        hidden = hidden_states_of(own.call(layer, hidden))
        others.call(layer, other)
    if not is_the_same(hidden, expected):
        raise ValueError(
            "layers do not give what they give in the model if each is called for all batches before the next one, for "
            "they hand something on by other ways than arguments: they cannot be pruned one by one"
        )


def _random(out: Any, generator: torch.Generator) -> Any:
    if isinstance(out, Tensor):
        numbers = torch.randn(out.shape, generator=generator, device="cpu")
        return numbers.to(out) if out.is_floating_point() else (numbers > 0).to(out)
    return rebuilt(out, [_random(part, generator) for part in out]) if isinstance(out, tuple | list) else out


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)
