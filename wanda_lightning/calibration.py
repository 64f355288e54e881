"""The walk over the decoder layers: what enters each layer when those before it are already pruned.

A dry run records the arguments that the model gives to every layer (masks and positions differ by layer in many
models) and the hidden states that enter the first; after that the layers are called one by one.
Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanda_lightning.decoder import DecoderLayer, PrunableLinear, max_sequence_length
from wanda_lightning.statistics import InputStatistic

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _DryRunDoneError(Exception):
    """Every layer's arguments are recorded: the rest of the model need not run."""


class _AllInputsSeenError(Exception):
    """The last linear of a layer has its input: its product and what follows are not needed."""


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
        hidden_BTD: list[Tensor],
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
            yield out[0] if isinstance(out, tuple) else out

    def collect(self, statistic: type[InputStatistic]) -> dict[str, InputStatistic]:
        """Run the layer and gather a statistic of every pruned linear's inputs; padding does not count.

        Args:
            statistic: The kind of statistic.

        Returns:
            The statistics by linear name. Linears fed by the same tensor share one object.

        Raises:
            ValueError: If an input is NaN or infinite, or a linear was never called.
        """
        collector = _Collector(statistic, self.layer.linears)
        with collector:
            for batch, mask_BT in enumerate(self.masks_BT):
                args, kwargs = self.arguments[batch]
                with collector.batch(mask_BT):
                    self.layer.module(self.hidden_BTD[batch], *args, **kwargs)
        for name, gathered in collector.statistics.items():
            if not torch.isfinite(gathered.total).all():
                raise ValueError(
                    f"the inputs of {name} are NaN or infinite: the layers before it overflow on this calibration set; "
                    "load the model in bfloat16 or float32, or check its weights"
                )
        if missing := [linear.name for linear in self.layer.linears if linear.name not in collector.statistics]:
            raise ValueError(
                f"no calibration token reached {', '.join(missing)}: use more samples, or leave them out with ignore"
            )
        return collector.statistics


class _Collector:
    """Forward hooks that feed the inputs of linears to their statistics."""

    def __init__(self, statistic: type[InputStatistic], linears: list[PrunableLinear]) -> None:
        self.statistic = statistic
        self.linears = linears
        self.statistics: dict[str, InputStatistic] = {}
        self._owners: set[str] = set()  # linears that feed their statistic; the others share one of these
        self._calls: list[str] = []  # linears called in this batch, in order
        self._inputs: list[tuple[Tensor, str]] = []  # inputs seen in this batch, kept alive so that `is` holds
        self._mask_BT: Tensor | None = None
        self._once_each = False  # whether a batch calls every linear exactly once: then the last one can be cut short

    def __enter__(self) -> "_Collector":
        self._hooks = [
            linear.module.register_forward_pre_hook(lambda _, args, linear=linear: self._see(linear, args[0]))
            for linear in self.linears
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def batch(self, mask_BT: Tensor | None) -> Iterator[None]:
        """Bracket one forward pass of the layer."""
        self._mask_BT = mask_BT
        self._calls.clear()
        with suppress(_AllInputsSeenError):
            yield
        self._inputs.clear()
        self._once_each = sorted(self._calls) == sorted(linear.name for linear in self.linears)

    def _see(self, linear: PrunableLinear, x: Tensor) -> None:
        name = linear.name
        self._calls.append(name)
        if name not in self.statistics:
            sharing = next((owner for seen, owner in self._inputs if seen is x), None)
            if sharing is None:
                self._owners.add(name)
            self.statistics[name] = self.statistics[sharing] if sharing else self.statistic(x.shape[-1], x.device)
        if name in self._owners:
            self._inputs.append((x, name))
            self.statistics[name].update(_real_tokens(x, self._mask_BT))
        if self._once_each and len(self._calls) == len(self.linears):
            raise _AllInputsSeenError


def walk(model: nn.Module, layers: Sequence[DecoderLayer], batches: Iterable[Batch]) -> Iterator[CalibratedLayer]:
    """Visit the decoder layers in order, each with the inputs that the layers before it give as they are now.

    Whatever the caller does to a layer while it is visited (such as pruning it) shows in the inputs of the next.

    Args:
        model: The causal language model; in eval mode, without gradients.
        layers: Its decoder layers.
        batches: Calibration batches; each is input_ids (B, T) int64, a mapping with ``input_ids`` and optionally
            ``attention_mask`` (0 = padding), or a tuple or list that starts with input_ids.

    Yields:
        The layer and what enters it.

    Raises:
        ValueError: If there are no batches, or one cannot be fed to the model.
    """
    hidden_BTD, arguments, masks_BT = _dry_run(model, [layer.module for layer in layers], batches)
    for index, layer in enumerate(layers):
        step = CalibratedLayer(layer, hidden_BTD, arguments[index], masks_BT)
        yield step
        if index + 1 < len(layers):  # nothing needs the outputs of the last layer
            for batch, out_BTD in enumerate(step.outputs()):
                hidden_BTD[batch] = out_BTD
        arguments[index] = []


def _dry_run(
    model: nn.Module, layers: list[nn.Module], batches: Iterable[Batch]
) -> tuple[list[Tensor], list[list[Arguments]], list[Tensor | None]]:
    """Run the model with empty layers; return the first hidden states, arguments[layer][batch] and token masks."""
    hidden_BTD: list[Tensor] = []
    masks_BT: list[Tensor | None] = []
    arguments: list[list[Arguments]] = [[] for _ in layers]
    extra_outputs: tuple[Any, ...] | None = None  # what a layer returns beside the hidden states, if it is a tuple

    def record(index: int, forward: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            nonlocal extra_outputs
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            before = arguments[index][-1] if arguments[index] else ((), {})
            shared = {name: _share(value, before[1].get(name)) for name, value in kwargs.items()}
            arguments[index].append((_share(args, before[0]), shared))
            if index == 0:
                hidden_BTD.append(hidden)
                if len(hidden_BTD) == 1:
                    out = forward(hidden, *args, **kwargs)
                    extra_outputs = out[1:] if isinstance(out, tuple) else None
            if index == len(layers) - 1:
                raise _DryRunDoneError
            return hidden if extra_outputs is None else (hidden, *extra_outputs)

        return recorded

    device = _embeddings(model).device
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_replaced_forward(layer, record(index, layer.forward)))
        for batch in batches:
            inputs = model_inputs(batch, model)
            mask_BT = inputs.get("attention_mask")
            masks_BT.append(None if mask_BT is None or bool(mask_BT.all()) else mask_BT.bool())
            with suppress(_DryRunDoneError):
                model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)
    if not hidden_BTD:
        raise ValueError("the calibration set is empty: at least one batch of input_ids is needed")
    if not any(mask is None or bool(mask.any()) for mask in masks_BT):
        raise ValueError("the calibration set holds padding only: attention_mask is 0 everywhere")
    return hidden_BTD, arguments, masks_BT


def model_inputs(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """Read a calibration batch and check that the model can take it.

    Args:
        batch: See :func:`walk`.
        model: The causal language model.

    Returns:
        ``input_ids`` and, where given, ``attention_mask``, each (B, T).

    Raises:
        ValueError: If there are no input_ids, or their type, shape, length or values are not the model's.
    """
    inputs: dict[str, Any]
    if isinstance(batch, Mapping):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    else:
        inputs = {"input_ids": batch[0] if isinstance(batch, tuple | list) and batch else batch}
    ids_BT = inputs.get("input_ids")
    if not isinstance(ids_BT, Tensor) or ids_BT.dim() != 2 or ids_BT.is_floating_point() or ids_BT.numel() == 0:
        given = (
            f"a {ids_BT.dtype} tensor of shape {tuple(ids_BT.shape)}" if isinstance(ids_BT, Tensor) else repr(ids_BT)
        )
        keys = f" under the keys {sorted(batch)}" if isinstance(batch, Mapping) else ""
        raise ValueError(f"a calibration batch must hold input_ids, integers of shape (B, T), got {given[:200]}{keys}")
    mask_BT = inputs.get("attention_mask")
    if mask_BT is not None and mask_BT.shape != ids_BT.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(ids_BT.shape)}, got {tuple(mask_BT.shape)}"
        )
    limit = max_sequence_length(model)
    if limit is not None and ids_BT.shape[1] > limit:
        raise ValueError(f"a calibration sequence has {ids_BT.shape[1]} tokens, the model takes at most {limit}")
    vocabulary = _embeddings(model).shape[0]
    if int(ids_BT.min()) < 0 or int(ids_BT.max()) >= vocabulary:
        raise ValueError(
            f"input_ids must lie in [0, {vocabulary}), the model's vocabulary, "
            f"got {int(ids_BT.min())} to {int(ids_BT.max())}: is this the model's tokenizer?"
        )
    return inputs


def _embeddings(model: nn.Module) -> Tensor:
    return cast(Any, model).get_input_embeddings().weight


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Put another forward on a module, and back what was there (accelerate keeps its hooks there)."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _real_tokens(x: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Drop the padding from a linear's inputs, shape (B, T, I) or flattened (B * T, I)."""
    if mask_BT is None:
        return x
    assert x.shape[:-1].numel() == mask_BT.numel(), f"inputs {tuple(x.shape)} do not fit {tuple(mask_BT.shape)} tokens"
    return x.reshape(-1, x.shape[-1])[mask_BT.reshape(-1).to(x.device)]


def _share(value: Any, previous: Any) -> Any:
    """Keep one copy of tensors that are equal from batch to batch; all else stays the batch's own.

    Dicts and caches are not shared: some models write to them while they run.
    """
    if isinstance(value, Tensor) and isinstance(previous, Tensor):
        same = value.shape == previous.shape and value.dtype == previous.dtype and value.device == previous.device
        return previous if same and torch.equal(value, previous) else value
    if type(value) is tuple and type(previous) is tuple and len(value) == len(previous):
        return tuple(map(_share, value, previous))
    return value
