"""The walk over the layers: what enters each layer when those before it are already pruned.

A dry run records the arguments that the model gives to every layer (masks and positions differ by layer in many
models) and the hidden states that enter the first; after that the layers are called one by one. A language model has
one stack of layers; other models may have several, and what lies between two is the model's own to run.
Shapes: B batch, T tokens, D hidden size.
"""

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.calibrated_layer import OVERFLOW, CalibratedLayer
from wanda_lightning.calibration.calls import hidden_states_of, split
from wanda_lightning.calibration.dense_inputs import DenseInputs
from wanda_lightning.calibration.dense_stream import DenseStream
from wanda_lightning.calibration.dry_run import dry_run
from wanda_lightning.calibration.feed import Feed, LanguageModelFeed
from wanda_lightning.calibration.handed_on import check_one_by_one, probe
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.language_model import uncompiled
from wanda_lightning.model.offload import in_memory, is_offloaded

log = logging.getLogger(__name__)

Visit = tuple[DecoderLayer, CalibratedLayer | None]
"""A layer, and what enters it if there are batches."""


class _AllLayersSeenError(Exception):
    """What follows the decoder layers need not run."""


def walk(
    model: nn.Module,
    layers: Sequence[DecoderLayer],
    batches: Iterable[Batch],
    activations: Place = "device",
    with_dense: bool = False,
    feed: Feed | None = None,
    with_dense_inputs: bool = False,
) -> Iterator[CalibratedLayer]:
    """Visit the layers in order, each with the inputs that the layers before it give as they are now.

    Whatever the caller does to a layer while it is visited (such as pruning it) shows in the inputs of the next. The
    weights of a layer that is offloaded are in memory while it is visited. Where the layers are of several lists, such
    as those of an encoder and a decoder, the model runs again before each list, up to there.

    Args:
        model: The model; in eval mode, without gradients.
        layers: Its layers, list by list in the order in which they are called.
        batches: Calibration batches; of a language model each is input_ids (B, T) int64, a mapping with ``input_ids``
            and optionally ``attention_mask`` (0 = padding), or a tuple or list that starts with input_ids.
        activations: Where the hidden states wait between two layers: ``"device"``, ``"cpu"`` or ``"disk"``.
        with_dense: Whether the hidden states of the dense model go along: each layer runs once more, as it is before
            it is visited. Behind the first list they begin with what its pruned layers give.
        feed: Runs the model on a batch. Default: as a language model.
        with_dense_inputs: Whether also what enters the linears in the dense model goes along.

    Yields:
        The layer and what enters it.

    Raises:
        ValueError: If there are no batches, one cannot be fed to the model, or its activations overflow.
    """
    feed = LanguageModelFeed(uncompiled(model)) if feed is None else feed
    stacks = in_stacks(layers)
    batches = iter(batches) if len(stacks) == 1 else [*batches]
    if (first := next(iter(batches), None)) is not None and len(stacks) == 1:
        batches = chain([first], batches)
    for number, stack in enumerate(stacks):
        modules = [layer.module for layer in stack]
        probed = None if feed.runs_layers or first is None else probe(feed, modules, first)
        if probed is None and is_offloaded(model) and not feed.runs_layers:
            log.warning(
                "layers hand something on to later ones: all are read from disk once for each calibration batch"
            )
        hidden_BTD, arguments, real = dry_run(feed, modules, batches, activations, probed.given if probed else None)
        if first is not None and number == 0 and not is_offloaded(model):  # all of it would be read for that
            hidden, behind = _tried(layers, stack, feed, feed.first(first))
            if probed:
                check_one_by_one(modules, probed, hidden, behind)
        dense = DenseStream(hidden_BTD, arguments) if with_dense or with_dense_inputs else None
        for index, layer in enumerate(stack):
            memory = _size(layer.module) if is_offloaded(layer.module) else None
            is_last = index + 1 == len(stack)
            dense_BTD = dense.hidden_BTD if dense else None
            seen = DenseInputs(layer, activations) if with_dense_inputs else None
            step = CalibratedLayer(layer, hidden_BTD, arguments[index], real, memory, is_last, dense_BTD, seen)
            with in_memory(layer.module):
                if dense:
                    dense.advance(index, layer, seen)
                yield step
                if seen:
                    seen.drop()
                if not is_last:
                    step.advance()
            arguments[index] = []


def visit(
    model: nn.Module,
    layers: Sequence[DecoderLayer],
    batches: Iterable[Batch] | None,
    activations: Place,
    with_dense: bool,
    feed: Feed,
    with_dense_inputs: bool,
) -> Generator[Visit]:
    """Visit the layers in order, also without batches.

    Args:
        model: See :func:`walk`, as all.
        layers: The layers.
        batches: Calibration batches; None where nothing has to be known of inputs.
        activations: A place.
        with_dense: Whether hidden states of the dense model go along.
        feed: Runs the model on a batch.
        with_dense_inputs: Whether what enters the linears in the dense model goes along.

    Yields:
        The layer, its weights in memory, and what enters it; None without batches.
    """
    if batches is None:
        for layer in layers:
            with in_memory(layer.module):
                yield layer, None
    else:
        for step in walk(model, layers, batches, activations, with_dense, feed, with_dense_inputs):
            yield step.layer, step


def in_stacks(layers: Sequence[DecoderLayer]) -> list[list[DecoderLayer]]:
    """Part layers into stacks: those of one list, and every matrix outside of lists for itself."""
    stacks: list[list[DecoderLayer]] = []
    for layer in layers:
        before = stacks[-1][-1] if stacks else None
        if before is None or before.list_name != layer.list_name or layer.is_matrix:
            stacks.append([])
        stacks[-1].append(layer)
    return stacks


def _tried(
    layers: Sequence[DecoderLayer], stack: Sequence[DecoderLayer], feed: Feed, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Run the model as it is: what overflows is better known before anything is pruned.

    Args:
        layers: Its layers, in the order in which they are called.
        stack: The first list of them.
        feed: Runs it.
        batch: A batch, or a part of one.

    Returns:
        What enters the first layer, and what leaves the last one of its list.

    Raises:
        ValueError: If what a layer gives is NaN or infinite.
    """
    seen: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(split(args, kwargs)[0].clone())  # the layer may write to it

    def leave(layer: DecoderLayer, out: Any) -> None:
        if layer is stack[-1]:
            seen.append(hidden_states_of(out))
        if not torch.isfinite(hidden_states_of(out)).all():
            raise ValueError(f"the activations of {layer.name} are NaN or infinite: {OVERFLOW}")
        if layer is layers[-1]:
            raise _AllLayersSeenError

    with ExitStack() as hooks, suppress(_AllLayersSeenError):
        hooks.callback(layers[0].module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for layer in layers:
            handle = layer.module.register_forward_hook(lambda _, __, out, layer=layer: leave(layer, out))
            hooks.callback(handle.remove)
        feed.run(batch)
    hidden, behind = seen
    return hidden, behind


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
