"""The dry run: what a model passes to each layer of a stack, where that does not depend on what the layers give.

The model runs with its layers replaced by recorders, so that masks, positions and whatever else a family computes
come from its own code. Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.call_order import CallOrder, is_passed_on
from wanda_lightning.calibration.calls import Arguments, split, with_hidden, with_own_mappings, without_hidden
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.calibration.hidden_states import HiddenStates, Place
from wanda_lightning.calibration.real_tokens import RealTokens
from wanda_lightning.calibration.stand_ins import EnoughSeenError, LayerForward, ending_at, standing_in
from wanda_lightning.calibration.stream import Stream, check_tokens


class Recorded(Stream):
    """The batches of a dry run.

    Args:
        hidden_BTD: The hidden states that enter the first layer.
        arguments: ``arguments[layer][batch]``.
        real: Which tokens are real, a batch.
    """

    def __init__(self, hidden_BTD: HiddenStates, arguments: list[list[Arguments]], real: list[RealTokens]) -> None:
        self.hidden_BTD, self.real = hidden_BTD, real
        self.arguments, *self._later = arguments

    def go_on(self) -> None:
        """Take the arguments of the next layer."""
        self.arguments = self._later.pop(0)

    def twin(self) -> "Recorded":
        """Copy the hidden states, and the mappings that early layers write to and late ones read."""
        hidden_BTD = HiddenStates(self.hidden_BTD.place)
        for batch_BTD in self.hidden_BTD:
            hidden_BTD.append(batch_BTD)
        copies: dict[int, MutableMapping[Any, Any]] = {}
        arguments = [[with_own_mappings(call, copies) for call in calls] for calls in [self.arguments, *self._later]]
        return Recorded(hidden_BTD, arguments, self.real)


class _Recorder:
    """Stands in for the layers while the model runs, and notes what they are called with."""

    def __init__(self, layers: int, activations: Place, given: Any) -> None:
        self.hidden_BTD = HiddenStates(activations)
        self.arguments: list[list[Arguments]] = [[] for _ in range(layers)]
        self._beside, self._last, self._layers = without_hidden(given), layers - 1, layers

    def start_batch(self) -> None:
        self.order = CallOrder(range(self._layers))
        self._hidden: Tensor | None = None  # that entered the layer before

    def stand_in(self, index: int, _: LayerForward) -> LayerForward:
        """Return the forward of a layer's stand-in."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = split(args, kwargs)
            self.order.called(index)
            if self._hidden is not None and not is_passed_on(self._hidden, hidden):
                raise ValueError(
                    f"the model changes the hidden states between decoder layers {index - 1} and {index} in some "
                    "batches, and not in the first: it cannot be pruned layer by layer"
                )
            self._record(index, arguments)
            if index == 0:
                self.hidden_BTD.append(hidden)
            if index == self._last and len(self.hidden_BTD) > 1:
                raise EnoughSeenError
            self._hidden = hidden
            return with_hidden(self._beside, hidden)

        return recorded

    def _record(self, index: int, arguments: Arguments) -> None:
        before = self.arguments[index][-1] if self.arguments[index] else Arguments((), {})
        shared = {name: _share(value, before.kwargs.get(name)) for name, value in arguments.kwargs.items()}
        self.arguments[index].append(arguments._replace(args=_share(arguments.args, before.args), kwargs=shared))


def dry_run(feed: Feed, layers: list[nn.Module], batches: Iterable[Batch], activations: Place, given: Any) -> Recorded:
    """Run the model for what its layers are called with.

    Args:
        feed: Runs the model.
        layers: Layers that it calls one after another.
        batches: Calibration batches.
        activations: Where the hidden states wait for the first layer.
        given: What a layer gives; what is beside the hidden states in it is what all of them seem to give.

    Returns:
        What enters the layers.

    Raises:
        ValueError: If a batch cannot be fed to the model, all are padding, or the layers are not called one by one.
    """
    recorder = _Recorder(len(layers), activations, given)
    real: list[RealTokens] = []
    parameters = [*signature(layers[0].forward).parameters]
    # The first batch goes on behind the layers, to see that none is called again, but not through the head.
    with standing_in(layers, recorder.stand_in), ending_at(feed.head):
        for number, batch in enumerate(batches):
            recorder.start_batch()
            with suppress(EnoughSeenError):
                feed.run(batch)
            recorder.order.ended()
            of_first = recorder.arguments[0][number].by_name(parameters)
            real.append(feed.real_tokens(batch, recorder.hidden_BTD.shapes[number], of_first))
    check_tokens(real)
    return Recorded(recorder.hidden_BTD, recorder.arguments, real)


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
