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
from wanda_lightning.calibration.call_order import CallOrder
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
    """What a list of layers does in the model as it is.

    Attributes:
        hidden_BTD: What enters the first layer.
        behind_BTD: What leaves the last one.
    """

    hidden_BTD: Tensor
    behind_BTD: Tensor


def look(layers: Sequence[DecoderLayer], stack: Sequence[DecoderLayer], feed: Feed, batch: Batch) -> Seen:
    """Run the model as it is, and on behind the layers of a language model, up to its head.

    Args:
        layers: Its layers, in the order in which they are called.
        stack: The first list of them.
        feed: Runs it.
        batch: A batch, or a part of one.

    Returns:
        What was seen of the first list.

    Raises:
        ValueError: If what a layer gives is NaN or infinite, or the list is not called in order, each layer once.
    """
    seen: list[Tensor] = []
    order = CallOrder(len(stack))
    places = {layer.module: index for index, layer in enumerate(stack)}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        order.called(places[module])
        if places[module] == 0:
            seen.append(split(args, kwargs)[0].clone())  # the layer may write to it

    def leave(layer: DecoderLayer, out: Any) -> None:
        if layer is stack[-1]:
            seen.append(hidden_states_of(out))
        if not torch.isfinite(hidden_states_of(out)).all():
            raise ValueError(f"the activations of {layer.name} are NaN or infinite: {OVERFLOW}")
        if layer is layers[-1] and feed.may_hand_on:  # which is known to call each of them once
            raise EnoughSeenError

    with ExitStack() as hooks, before_calls(places, enter), ending_at(feed.head), suppress(EnoughSeenError):
        for layer in layers:
            handle = layer.module.register_forward_hook(lambda _, __, out, layer=layer: leave(layer, out))
            hooks.callback(handle.remove)
        feed.run(batch)
    order.ended()
    return Seen(*seen)


def check_calls_between(layers: Sequence[nn.Module], feed: Feed, batch: Batch, expected_BTD: Tensor) -> None:
    """Make sure that layers give what they give in the model if each is called for other batches, too, before the next.

    Args:
        layers: Layers that the model calls one after another.
        feed: Runs the model.
        batch: A batch, or a part of one.
        expected_BTD: What the last layer gives for it.

    Raises:
        ValueError: If they do not.
    """
    behind: list[Tensor] = []

    def between(index: int, forward: LayerForward) -> LayerForward:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = split(args, kwargs)
            with_own_mappings(arguments, {}).call(forward, of_another(hidden))
            out = called(forward, hidden, args, kwargs)
            with_own_mappings(arguments, {}).call(forward, of_another(hidden))
            if index + 1 == len(layers):
                behind.append(hidden_states_of(out))
                raise EnoughSeenError
            return out

        return call

    with standing_in(layers, between), suppress(EnoughSeenError):
        feed.run(batch)
    if not is_the_same(behind[0], expected_BTD):
        raise ValueError(
            "layers give something else when they are called for other batches, too, before the next layer (a cache, "
            "randomness, or something that they hand on by other ways than arguments): they cannot be pruned one by one"
        )
