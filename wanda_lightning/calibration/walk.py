"""The walk over the decoder layers: what enters each layer when those before it are already pruned.

A dry run records the arguments that the model gives to every layer (masks and positions differ by layer in many
models) and the hidden states that enter the first; after that the layers are called one by one.
Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch, model_inputs
from wanda_lightning.calibration.collector import Collector
from wanda_lightning.calibration.dry_run import Arguments, dry_run
from wanda_lightning.calibration.hidden_states import HiddenStates, Place
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.language_model import uncompiled
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.offload import device_of, in_memory, is_offloaded
from wanda_lightning.statistics import InputHessian, InputNorm, InputStatistic

OVERFLOW = (
    "the model overflows on this calibration set; load it in bfloat16 or float32, or check its weights and the batches"
)

__all__ = ["Batch", "CalibratedLayer", "model_inputs", "walk"]


class _AllLayersSeenError(Exception):
    """What follows the decoder layers need not run."""


class CalibratedLayer:
    """A decoder layer with everything that enters it, batch by batch.

    Attributes:
        layer: The decoder layer.
        hidden_BTD: The hidden states entering it, one tensor a batch.
        arguments: What else the model passes to it, a pair of args and kwargs a batch.
        masks_BT: Which tokens are real, one boolean tensor a batch; None where all are.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        hidden_BTD: HiddenStates,
        arguments: list[Arguments],
        masks_BT: list[Tensor | None],
    ) -> None:
        self.layer = layer
        self.hidden_BTD = hidden_BTD
        self.arguments = arguments
        self.masks_BT = masks_BT

    def outputs(self) -> Iterator[Tensor]:
        """Run the layer as it is now; yield its hidden states (B, T, D) a batch at a time."""
        for hidden_BTD, (args, kwargs) in zip(self.hidden_BTD, self.arguments, strict=True):
            out = self.layer.module(hidden_BTD, *args, **kwargs)
            yield out[0] if isinstance(out, tuple | list) else out

    def passes(self, statistic: type[InputStatistic], memory: int | None) -> list[list[PrunableLinear]]:
        """Split the pruned linears so that the statistics of each part fit in memory together.

        Args:
            statistic: The kind of statistic.
            memory: Bytes that Hessians may take. Linears that share an input are not parted, however large theirs is.
                Default: no limit.

        Returns:
            The linears of each pass over the calibration set.
        """
        if memory is None or not issubclass(statistic, InputHessian) or not self.layer.linears:
            return [self.layer.linears] if self.layer.linears else []
        shared = self.collect(InputNorm, batches=1)
        groups: dict[object, list[PrunableLinear]] = {}
        for linear in self.layer.linears:
            # Which experts of a list are called differs from batch to batch: they stay together.
            alike = linear.experts if linear.experts and linear.expert is None else id(shared[linear.name])
            groups.setdefault(alike, []).append(linear)
        sizes = [4 * sum({id(shared[x.name]): x.weight_OI.shape[1] ** 2 for x in g}.values()) for g in groups.values()]
        parts: list[list[PrunableLinear]] = []
        left = 0
        for group, size in zip(groups.values(), sizes, strict=True):
            if size > left:
                parts.append([])
                left = max(memory, *sizes)
            parts[-1] += group
            left -= size
        return parts

    def collect(
        self,
        statistic: type[InputStatistic],
        linears: list[PrunableLinear] | None = None,
        batches: int | None = None,
    ) -> dict[str, InputStatistic]:
        """Run the layer and gather a statistic of every pruned linear's inputs; padding does not count.

        Args:
            statistic: The kind of statistic.
            linears: Those of the layer whose inputs are wanted. Default: all that are pruned.
            batches: Use the first so many only. Default: all.

        Returns:
            The statistics by linear name. Linears fed by the same tensor share one object. Of an expert that no token
            was routed to it is empty: its ``tokens`` are 0.

        Raises:
            ValueError: If an input is NaN or infinite, or a linear was never called that no router could pass by.
        """
        collector = Collector(statistic, self.layer.linears if linears is None else linears)
        seen = zip(self.hidden_BTD, self.arguments, self.masks_BT, strict=True)
        with collector:
            for hidden_BTD, (args, kwargs), mask_BT in islice(seen, batches):
                with collector.batch(tuple(hidden_BTD.shape), mask_BT):
                    self.layer.module(hidden_BTD, *args, **kwargs)
        statistics = collector.statistics()
        for name, gathered in statistics.items():
            if not torch.isfinite(gathered.total).all():
                raise ValueError(f"the inputs of {name} are NaN or infinite: {OVERFLOW}")
        return statistics


def walk(
    model: nn.Module, layers: Sequence[DecoderLayer], batches: Iterable[Batch], activations: Place = "device"
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
    for index, layer in enumerate(layers):
        step = CalibratedLayer(layer, hidden_BTD, arguments[index], masks_BT)
        with in_memory(layer.module):
            yield step
            if index + 1 < len(layers):  # nothing needs the outputs of the last layer
                for batch, out_BTD in enumerate(step.outputs()):
                    hidden_BTD[batch] = out_BTD
        arguments[index] = []


def _check_activations(model: nn.Module, layers: Sequence[DecoderLayer], batch: Batch) -> None:
    """Run one sequence through the model as it is: what overflows is better known before anything is pruned."""
    if is_offloaded(model):  # all of it would be read for that
        return

    def look(layer: DecoderLayer, out: Any) -> None:
        hidden_BTD = out[0] if isinstance(out, tuple | list) else out
        if not torch.isfinite(hidden_BTD).all():
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
