"""The model as it is, on a few tokens or a first batch: what goes wrong is better known before anything is pruned.

Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.calibrated_layer import OVERFLOW
from wanda_lightning.calibration.calls import (
    called,
    hidden_states_of,
    is_the_same,
    of_another,
    split,
    with_own_mappings,
)
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.calibration.stand_ins import EnoughSeenError, LayerForward, ending_at, standing_in
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.hooks import before_calls


class Seen(NamedTuple):
    """What lists of layers do in the model as it is.

    Attributes:
        calls: The places of the layers in their list, in the order in which they are called, a list.
        hidden_BTD: What enters the first call of the first list.
        behind_BTD: What its last call gives.
    """

    calls: list[list[int]]
    hidden_BTD: Tensor
    behind_BTD: Tensor


def look(stacks: Sequence[Sequence[DecoderLayer]], feed: Feed, batch: Batch) -> Seen:
    """Run the model as it is; a language model up to its head.

    Args:
        stacks: Its layers, list by list.
        feed: Runs it.
        batch: A batch, or a part of one.

    Returns:
        What was seen.

    Raises:
        ValueError: If what a layer gives is NaN or infinite, or a layer is not called.
    """
    places = {layer.module: (number, index) for number, stack in enumerate(stacks) for index, layer in enumerate(stack)}
    calls: list[list[int]] = [[] for _ in stacks]
    entered: list[Tensor] = []
    behind: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number, index = places[module]
        if number == 0 and not entered:
            entered.append(split(args, kwargs)[0].clone())  # the layer may write to it
        calls[number].append(index)

    def leave(module: nn.Module, _: Any, out: Any) -> None:
        number, index = places[module]
        if number == 0:
            behind[:] = [hidden_states_of(out)]
        if not torch.isfinite(hidden_states_of(out)).all():
            raise ValueError(f"the activations of {stacks[number][index].name} are NaN or infinite: {OVERFLOW}")

    with ExitStack() as hooks, before_calls(places, enter), ending_at(feed.head), suppress(EnoughSeenError):
        for module in places:
            hooks.callback(module.register_forward_hook(leave).remove)
        feed.run(batch)
    for stack, order in zip(stacks, calls, strict=True):
        if len({*order}) < len(stack):
            raise ValueError(
                f"the model calls {len({*order})} of its {len(stack)} decoder layers: name their list with layers"
            )
    return Seen(calls, *entered, *behind)


def check_calls_between(
    layers: Sequence[nn.Module], calls: int, feed: Feed, batch: Batch, expected_BTD: Tensor
) -> None:
    """Make sure that layers give what they give in the model if each is called for other batches, too, before the next.

    Args:
        layers: The layers of a stack.
        calls: How often the model calls any of them.
        feed: Runs the model.
        batch: A batch, or a part of one.
        expected_BTD: What the last call gives for it.

    Raises:
        ValueError: If they do not.
    """
    behind: list[Tensor] = []

    def between(_: int, forward: LayerForward) -> LayerForward:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = split(args, kwargs)
            with_own_mappings(arguments, {}).call(forward, of_another(hidden))
            out = called(forward, hidden, args, kwargs)
            with_own_mappings(arguments, {}).call(forward, of_another(hidden))
            behind.append(hidden_states_of(out))
            if len(behind) == calls:
                raise EnoughSeenError
            return out

        return call

    with standing_in(layers, between), suppress(EnoughSeenError):
        feed.run(batch)
    if not is_the_same(behind[-1], expected_BTD):
        raise ValueError(
            "layers give something else when they are called for other batches, too, before the next layer (a cache, "
            "randomness, or something that they hand on by other ways than arguments): they cannot be pruned one by one"
        )
