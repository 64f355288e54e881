"""Which layers of a model are pruned: what it calls, in which order, and what lies outside of them."""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

from torch import nn

from wanda_lightning.allocation.selection import Selection
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.called_stacks import called_stacks
from wanda_lightning.calibration.feed import Feed, Forward, LanguageModelFeed
from wanda_lightning.calibration.walk import in_stacks
from wanda_lightning.engine.shared_weights import repeats_in
from wanda_lightning.model.decoder import DecoderLayer, decoder_layers
from wanda_lightning.model.hooks import before_calls
from wanda_lightning.model.language_model import is_language_model
from wanda_lightning.model.offload import is_offloaded
from wanda_lightning.model.stacks import no_stacks, outside_of, stack_names

log = logging.getLogger(__name__)


def feed_of(model: nn.Module, forward: Forward | None) -> Feed:
    """Choose how batches go through a model: a language model takes token ids, unless somebody says otherwise."""
    return LanguageModelFeed(model) if forward is None and is_language_model(model) else Feed(model, forward)


class Found(NamedTuple):
    """What is known of the layers of a model before it is pruned.

    Attributes:
        calibration: The batches; a first one may have been looked at.
        selection: What is asked for, with the names of the lists of layers.
        in_order: Puts layers in the order in which the model calls them.
        look_outside: Finds the matrices outside of them, with the reason why they stay dense.
        uncalled: Names of layers and of linears with a shared matrix that are not called.
    """

    calibration: Iterable[Batch] | None
    selection: Selection
    in_order: Callable[[Sequence[DecoderLayer]], list[DecoderLayer]] = list
    look_outside: Callable[[nn.Module, Sequence[DecoderLayer]], dict[str, str]] = lambda model, layers: {}
    uncalled: Collection[str] = ()


def find_layers(feed: Feed, calibration: Iterable[Batch] | None, selection: Selection) -> Found:
    """Find the lists of layers of a model that is fed in its own way, by running it on the first batch.

    Args:
        feed: Runs the model.
        calibration: The batches; if there are none, the lists are those that the structure of the model tells.
        selection: What is asked for.

    Returns:
        What was found. Of a language model that is fed as such it is only what it does not call.

    Raises:
        ValueError: If there are no layers that are called one after another, or some are not called.
    """
    if isinstance(feed, LanguageModelFeed):
        return _in_language_model(feed, calibration, selection)
    named = [selection.layers] if isinstance(selection.layers, str) else selection.layers
    if named is None and is_language_model(feed.model):
        named = [decoder_layers(feed.model)[0].list_name]
    batches = None if calibration is None else [*calibration]
    outside = partial(look_outside, are_named=named is not None)
    if not batches:
        if not (by_structure := tuple(named or stack_names(feed.model))):
            raise no_stacks(feed.model)
        return Found(batches, replace(selection, layers=by_structure), look_outside=outside)
    feed.tensors(batches[0])  # which refuses a batch without any
    names, order = called_stacks(feed, batches[0], named)

    def in_order(layers: Sequence[DecoderLayer]) -> list[DecoderLayer]:
        return [*chain(*sorted(in_stacks(layers), key=lambda stack: order(stack[0].module)))]

    return Found(batches, replace(selection, layers=tuple(names)), in_order, outside)


def _in_language_model(feed: Feed, calibration: Iterable[Batch] | None, selection: Selection) -> Found:
    """See what a language model does not call, where its structure leaves that open, by running it on a few tokens.

    Layers of several kinds may be passed by, as Mllama's cross-attention without an image; and each of the layers that
    share a block may call another part of it, as Zamba 2's do.
    """
    if calibration is None or is_offloaded(feed.model):  # once it has run, what it shares would not be known any more
        return Found(calibration, selection)
    decoder = decoder_layers(feed.model, selection.targets, selection.ignore, selection.layers)
    shared = {name for repeat in repeats_in(decoder) for name in (repeat.name, repeat.first)}
    linears = [x for layer in decoder for x in layer.linears if x.may_be_passed_by and x.name in shared]
    layers = decoder if len({type(layer.module) for layer in decoder}) > 1 else []
    if not (linears or layers) or not (batches := [*calibration]):
        return Found(calibration, selection)
    watched = {x.name: x.module for some in (linears, layers) for x in some}
    called: set[nn.Module] = set()
    with before_calls(watched.values(), lambda module, *_: called.add(module)):
        feed.run(feed.first(batches[0]))
    uncalled = {name for name, module in watched.items() if module not in called}
    if patterns := [f"{layer.name}.*" for layer in layers if layer.name in uncalled and layer.linears]:
        raise ValueError(
            f"the model passes by {len(patterns)} of its {len(layers)} decoder layers on these batches, as "
            "cross-attention is not called without an image: leave them out with "
            f"ignore={patterns}, or give images, too, and say with forward how the model is called"
        )
    return Found(batches, selection, uncalled=uncalled)


def look_outside(model: nn.Module, layers: Sequence[DecoderLayer], are_named: bool) -> dict[str, str]:
    """Say which matrices lie outside of the layers and stay dense.

    Args:
        model: The model.
        layers: Its layers.
        are_named: Whether the user said which lists of layers are meant.

    Returns:
        The names of these matrices, with the reason.

    Raises:
        ValueError: If they are most of the model, and the user did not say which layers are meant.
    """
    outside, share = outside_of(model, [layer.module for layer in layers])
    if outside:
        largest = sorted(outside, key=lambda name: -outside[name])[:3]
        what = f"{share:.0%} of the matrix weights lie outside of the layers and stay dense; the largest: " + ", ".join(
            f"{name} ({outside[name]:,})" for name in largest
        )
        if share > 0.5 and not are_named:
            lists = ", ".join(dict.fromkeys(layer.list_name for layer in layers))
            raise ValueError(f"{what}. Lists of layers: {lists}. If it is to be so, name them with layers")
        log.log(logging.WARNING if share > 0.1 else logging.INFO, "%s", what)
    return {name: "outside of the layers" for name in outside}
