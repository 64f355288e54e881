"""The model's own run on every batch, which waits before one layer of a stack after the other.

So the model computes what it passes to a layer, and whatever it does between two layers, from what the pruned layers
before gave. A run that waits holds whatever the model's code holds; where nothing depends on what layers give, it is
recorded instead (see dry_run.py), which holds less. Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.call_order import CallOrder
from wanda_lightning.calibration.calls import Arguments, hidden_states_of, split, with_hidden, without_hidden
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.calibration.hidden_states import HiddenStates, Place
from wanda_lightning.calibration.resumable import Resumable, pause
from wanda_lightning.calibration.stand_ins import LayerForward, standing_in
from wanda_lightning.calibration.stream import Stream, check_tokens
from wanda_lightning.model.decoder import DecoderLayer


class _Call(NamedTuple):
    """A call of a layer that waits for what the layer gives."""

    layer: int
    hidden: Tensor
    arguments: Arguments


class _Run:
    """The run of the model on one batch.

    Attributes:
        beside: What the layer that it waits for gives beside the hidden states.
    """

    def __init__(self, run: Callable[[], None], calls: Sequence[int]) -> None:
        self._run = Resumable(run)
        self._order = CallOrder(calls)
        self._fill: Callable[[], None] | None = None
        self.beside: Any = None

    def next_call(self) -> _Call:
        """Let the model run up to its next call of a layer."""
        if self._fill is not None:
            self._fill()
        call = self._run.resume()
        if call is None:
            self._order.ended()
        self._order.called(call.layer)
        self._fill, self.beside = None, None
        return call

    def set_aside(self, aside: Callable[[Tensor], Callable[[], None]], call: _Call) -> None:
        """Free what the model holds of the hidden states that it passes on, while it waits, if nothing reads them."""
        if not _may_hold(call.arguments[:2], call.hidden.untyped_storage()._cdata):
            self._fill = aside(call.hidden)

    def give_up(self) -> None:
        self._run.give_up()


class Waiting(Stream):
    """A run of the model for every batch.

    Args:
        feed: Runs the model.
        layers: The layers of a stack.
        batches: Calibration batches.
        activations: Where the hidden states wait.
        calls: The places of the layers in the stack, in the order in which the model calls them.

    Raises:
        ValueError: If a batch cannot be fed to the model, all are padding, or another layer is called first.
    """

    def __init__(
        self,
        feed: Feed,
        layers: list[nn.Module],
        batches: Iterable[Batch],
        activations: Place,
        calls: Sequence[int],
    ) -> None:
        self._feed, self._layers, self._batches, self._calls = feed, layers, [*batches], calls
        self._given: Any = None  # what the layer gives, for the run that goes on
        self._runs = [_Run(partial(feed.run, batch), calls) for batch in self._batches]
        self.hidden_BTD, self.arguments, self.real = HiddenStates(activations), [], []
        parameters = [*signature(layers[calls[0]].forward).parameters]
        try:
            with standing_in(self._layers, self._wait):
                for batch, run in zip(self._batches, self._runs, strict=True):
                    call = run.next_call()
                    self.hidden_BTD.append(call.hidden)
                    self.arguments.append(call.arguments)
                    named = call.arguments.by_name(parameters)
                    self.real.append(feed.real_tokens(batch, self.hidden_BTD.shapes[-1], named))
            check_tokens(self.real)
        except BaseException:
            self.close()
            raise

    def call(self, layer: DecoderLayer, batch: int, hidden_BTD: Tensor) -> Any:
        """Call the forward of the layer: hooks on the layer itself run in the call of the model, which waits."""
        if any(linear.module is layer.module for linear in layer.linears):  # where hooks gather statistics
            return super().call(layer, batch, hidden_BTD)
        return self.arguments[batch].call(layer.module.forward, hidden_BTD)

    def take(self, batch: int, out: Any) -> Tensor:
        """Take what the layer gives for a batch; see :meth:`Stream.take`."""
        self._runs[batch].beside = without_hidden(out)
        return hidden_states_of(out)

    def go_on(self) -> None:
        """Give the model what the layer gave, and let it run up to the next one."""
        with standing_in(self._layers, self._wait):
            for number, run in enumerate(self._runs):
                given = self.hidden_BTD[number]
                self._given = with_hidden(run.beside, given)
                call = run.next_call()
                self._given = None
                self.arguments[number] = call.arguments
                if call.hidden is given:  # and nobody else's
                    run.set_aside(partial(self.hidden_BTD.set_aside, name=f"entered-{number}"), call)
                else:
                    self.hidden_BTD[number] = call.hidden

    def twin(self) -> "Waiting":
        """Return runs of their own on the same batches."""
        return Waiting(self._feed, self._layers, self._batches, self.hidden_BTD.place, self._calls)

    def close(self) -> None:
        """Leave all runs where they are."""
        for run in self._runs:
            run.give_up()

    def _wait(self, index: int, _: LayerForward) -> LayerForward:
        """Let calls of a layer wait: those of the model, for nobody else calls it meanwhile."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            pause(_Call(index, *split(args, kwargs)))
            return self._given

        return forward


def _may_hold(value: Any, storage: int) -> bool:
    """Whether a storage may be that of a tensor among arguments."""
    if isinstance(value, Tensor):
        return value.untyped_storage()._cdata == storage
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, tuple | list):
        return any(_may_hold(part, storage) for part in value)
    return not isinstance(value, bool | int | float | str | None)
