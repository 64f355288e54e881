"""The dry run: what the model passes to each of its decoder layers, without running them.

The model runs with its layers replaced by recorders, so that masks, positions and whatever else a family computes
come from its own code. Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch, model_inputs
from wanda_lightning.calibration.hidden_states import HiddenStates, Place
from wanda_lightning.model.offload import device_of
from wanda_lightning.model.replaced import replaced

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _DryRunDoneError(Exception):
    """Every layer's arguments are recorded: the rest of the model need not run."""


class _Recorder:
    """Stands in for the decoder layers while the model runs, and notes what they are called with."""

    def __init__(self, layers: list[nn.Module], activations: Place) -> None:
        self.hidden_BTD = HiddenStates(activations)
        self.arguments: list[list[Arguments]] = [[] for _ in layers]
        self._last = len(layers) - 1
        self._called = 0  # layers in this batch
        self._passed: Tensor | None = None  # the hidden states that the last of them was given
        self._extra_outputs: tuple[Any, ...] | None = None  # what a layer returns beside them, if it does

    def start_batch(self) -> None:
        self._called = 0

    def end_batch(self) -> None:
        if self._called <= self._last:
            raise ValueError(
                f"the model calls {self._called} of its {self._last + 1} decoder layers: name their list with layers"
            )

    def forward(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a layer's stand-in, given the layer's own."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            self._check_place(index, hidden)
            before = self.arguments[index][-1] if self.arguments[index] else ((), {})
            shared = {name: _share(value, before[1].get(name)) for name, value in kwargs.items()}
            self.arguments[index].append((_share(args, before[0]), shared))
            if index == 0:
                self.hidden_BTD.append(hidden)
                if len(self.hidden_BTD) == 1:
                    out = forward(hidden, *args, **kwargs)
                    self._extra_outputs = tuple(out[1:]) if isinstance(out, tuple | list) else None
            if index == self._last and len(self.hidden_BTD) > 1:
                raise _DryRunDoneError
            return hidden if self._extra_outputs is None else (hidden, *self._extra_outputs)

        return recorded

    def _check_place(self, index: int, hidden: Tensor) -> None:
        """Make sure that calling the layers one after another is what the model does."""
        if index != self._called:
            raise ValueError(
                f"the model calls decoder layer {index} where layer {self._called} of {self._last + 1} would be next: "
                "only models that call each of their layers once and in order can be pruned layer by layer"
            )
        passed = cast(Tensor, self._passed)
        if index and hidden is not passed and not torch.equal(hidden.to(passed.device), passed):
            raise ValueError(
                f"the model changes the hidden states between decoder layers {index - 1} and {index}: it cannot be "
                "pruned layer by layer"
            )
        self._called += 1
        self._passed = hidden


def dry_run(
    model: nn.Module, layers: list[nn.Module], batches: Iterable[Batch], activations: Place = "device"
) -> tuple[HiddenStates, list[list[Arguments]], list[Tensor | None]]:
    """Run the model with empty layers.

    Args:
        model: The causal language model.
        layers: Its decoder layers.
        batches: Calibration batches.
        activations: Where the hidden states wait for the first layer.

    Returns:
        The hidden states that enter the first layer, ``arguments[layer][batch]``, and which tokens are real (None where
        all are).

    Raises:
        ValueError: If a batch cannot be fed to the model, there is none, or the layers are not called one by one.
    """
    recorder = _Recorder(layers, activations)
    masks_BT: list[Tensor | None] = []
    device = device_of(cast(Any, model).get_input_embeddings())
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(replaced(layer, "forward", recorder.forward(index, layer.forward)))
        # The first batch goes on behind the last layer, to see that none is called again, but not through the head.
        head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None:
            stack.enter_context(replaced(head, "forward", _stop))
        for batch in batches:
            inputs = model_inputs(batch, model)
            mask_BT = inputs.get("attention_mask")
            masks_BT.append(None if mask_BT is None or bool(mask_BT.all()) else mask_BT.bool())
            recorder.start_batch()
            with suppress(_DryRunDoneError):
                model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)
            recorder.end_batch()
    if not masks_BT:
        raise ValueError("the calibration set is empty: at least one batch of input_ids is needed")
    if not any(mask is None or bool(mask.any()) for mask in masks_BT):
        raise ValueError("the calibration set holds padding only: attention_mask is 0 everywhere")
    return recorder.hidden_BTD, recorder.arguments, masks_BT


def _stop(*_: Any, **__: Any) -> None:
    raise _DryRunDoneError


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
