"""The walk over the decoder layers: what enters each layer when those before it are already pruned.

A dry run records the arguments that the model gives to every layer (masks and positions differ by layer in many
models) and the hidden states that enter the first; after that the layers are called one by one.
Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from typing import Any, cast

import torch
from torch import nn

from wanda_lightning.calibration.batches import Batch, model_inputs
from wanda_lightning.calibration.calibrated_layer import OVERFLOW, CalibratedLayer, hidden_states_of
from wanda_lightning.calibration.dense_inputs import DenseInputs
from wanda_lightning.calibration.dense_stream import DenseStream
from wanda_lightning.calibration.dry_run import dry_run
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.language_model import uncompiled
from wanda_lightning.model.offload import device_of, in_memory, is_offloaded


class _AllLayersSeenError(Exception):
    """What follows the decoder layers need not run."""


def walk(
    model: nn.Module,
    layers: Sequence[DecoderLayer],
    batches: Iterable[Batch],
    activations: Place = "device",
    with_dense: bool = False,
    with_dense_inputs: bool = False,
) -> Iterator[CalibratedLayer]:
    """Visit the decoder layers in order, each with the inputs that the layers before it give as they are now.

    Whatever the caller does to a layer while it is visited (such as pruning it) shows in the inputs of the next. The
    weights of a layer that is offloaded are in memory while it is visited.

    Args:
        model: The causal language model; in eval mode, without gradients.
        layers: Its decoder layers.
        batches: Calibration batches; each is input_ids (B, T) int64, a mapping with ``input_ids`` and optionally
            ``attention_mask`` (0 = padding), or a tuple or list that starts with input_ids.
        activations: Where the hidden states wait between two layers: ``"device"``, ``"cpu"`` or ``"disk"``.
        with_dense: Whether the hidden states of the dense model go along: each layer runs once more, as it is before
            it is visited.
        with_dense_inputs: Whether also what enters the linears in the dense model goes along.

    Yields:
        The layer and what enters it.

    Raises:
        ValueError: If there are no batches, one cannot be fed to the model, or its activations overflow.
    """
    batches = iter(batches)
    if (first := next(batches, None)) is not None:
        batches = chain([first], batches)
    modules = [layer.module for layer in layers]
    hidden_BTD, arguments, masks_BT = dry_run(uncompiled(model), modules, batches, activations)
    if first is not None:
        _check_activations(model, layers, first)
    dense = DenseStream(hidden_BTD, arguments) if with_dense or with_dense_inputs else None
    for index, layer in enumerate(layers):
        memory = _size(layer.module) if is_offloaded(layer.module) else None
        is_last = index + 1 == len(layers)
        dense_BTD = dense.hidden_BTD if dense else None
        seen = DenseInputs(layer, activations) if with_dense_inputs else None
        step = CalibratedLayer(layer, hidden_BTD, arguments[index], masks_BT, memory, is_last, dense_BTD, seen)
        with in_memory(layer.module):
            if dense:
                dense.advance(index, layer, seen)
            yield step
            if seen:
                seen.drop()
            if not is_last:
                step.advance()
        arguments[index] = []


def _check_activations(model: nn.Module, layers: Sequence[DecoderLayer], batch: Batch) -> None:
    """Run one sequence through the model as it is: what overflows is better known before anything is pruned."""
    if is_offloaded(model):  # all of it would be read for that
        return

    def look(layer: DecoderLayer, out: Any) -> None:
        if not torch.isfinite(hidden_states_of(out)).all():
            raise ValueError(f"the activations of {layer.name} are NaN or infinite: {OVERFLOW}")
        if layer is layers[-1]:
            raise _AllLayersSeenError

    inputs = {name: tensor[:1] for name, tensor in model_inputs(batch, model).items()}
    device = device_of(cast(Any, model).get_input_embeddings())
    with ExitStack() as hooks, suppress(_AllLayersSeenError):
        for layer in layers:
            handle = layer.module.register_forward_hook(lambda _, __, out, layer=layer: look(layer, out))
            hooks.callback(handle.remove)
        model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
