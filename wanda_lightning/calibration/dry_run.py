"""The dry run: what the model passes to each layer of a stack.

The model runs with its layers replaced by recorders, so that masks, positions and whatever else a family computes
come from its own code. The layers run meanwhile, for what a model passes to one layer may be what another gave; not
those of a language model, unless they hand something on (see handed_on.py). Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.calls import Arguments, called, hidden_states_of, is_the_same, rebuilt, split
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.calibration.hidden_states import HiddenStates, Place
from wanda_lightning.calibration.real_tokens import RealTokens
from wanda_lightning.model.replaced import replaced


class _DryRunDoneError(Exception):
    """Every layer's arguments are recorded: the rest of the model need not run."""


class _Recorder:
    """Stands before or in for the layers while the model runs, and notes what they are called with."""

    def __init__(self, layers: list[nn.Module], activations: Place, stand_in: Any, goes_on: bool) -> None:
        self.hidden_BTD = HiddenStates(activations)
        self.arguments: list[list[Arguments]] = [[] for _ in layers]
        self.last_output: Tensor | None = None  # of the first batch, if the layers run
        self._given, self._goes_on = stand_in, goes_on
        self._last = len(layers) - 1
        self._called = 0  # layers in this batch
        self._passed: Tensor | None = None  # what the last of them gave; where they do not run, what it was given

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
            hidden, arguments = split(args, kwargs)
            self._check_place(index, hidden)
            self._record(index, arguments)
            if index == 0:
                self.hidden_BTD.append(hidden)
            if self._given is None:
                return self._run(index, hidden, forward, args, kwargs)
            return self._stand_in(index, hidden)

        return recorded

    def _record(self, index: int, arguments: Arguments) -> None:
        before = self.arguments[index][-1] if self.arguments[index] else Arguments((), {})
        shared = {name: _share(value, before.kwargs.get(name)) for name, value in arguments.kwargs.items()}
        self.arguments[index].append(Arguments(_share(arguments.args, before.args), shared, arguments.keyword))

    def _stand_in(self, index: int, hidden: Tensor) -> Any:
        """Return the hidden states as they came."""
        if index == self._last and len(self.hidden_BTD) > 1:
            raise _DryRunDoneError
        given = self._given
        return hidden if isinstance(given, Tensor) else rebuilt(given, [hidden, *given[1:]])

    def _run(
        self, index: int, hidden: Tensor, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the layer; the last one only for the first batch, to be compared with."""
        if index == self._last and len(self.hidden_BTD) > 1:
            raise _DryRunDoneError
        out = called(forward, hidden, args, kwargs)
        self._passed = hidden_states_of(out)
        if index == self._last:
            self.last_output = self._passed
            if not self._goes_on:
                raise _DryRunDoneError
        return out

    def _check_place(self, index: int, hidden: Tensor) -> None:
        """Make sure that calling the layers one after another is what the model does."""
        if index != self._called:
            raise ValueError(
                f"the model calls decoder layer {index} where layer {self._called} of {self._last + 1} would be next: "
                "only models that call each of their layers once and in order can be pruned layer by layer"
            )
        if index and not is_passed_on(cast(Tensor, self._passed), hidden):
            raise ValueError(
                f"the model changes the hidden states between decoder layers {index - 1} and {index}: it cannot be "
                "pruned layer by layer"
            )
        self._called += 1
        self._passed = hidden


def is_passed_on(given: Tensor, taken: Tensor) -> bool:
    """Whether what enters a layer is what another gave."""
    if taken is given:
        return True
    return taken.shape == given.shape and torch.equal(taken.to(given.device), given)


def dry_run(
    feed: Feed,
    layers: list[nn.Module],
    batches: Iterable[Batch],
    activations: Place = "device",
    stand_in: Any = None,
) -> tuple[HiddenStates, list[list[Arguments]], list[RealTokens]]:
    """Run the model for what its layers are called with.

    Args:
        feed: Runs the model.
        layers: Layers that it calls one after another.
        batches: Calibration batches.
        activations: Where the hidden states wait for the first layer.
        stand_in: What the layers may give instead of running, see ``handed_on.py``; None: they run.

    Returns:
        The hidden states that enter the first layer, ``arguments[layer][batch]``, and which tokens are real.

    Raises:
        ValueError: If a batch cannot be fed to the model, there is none, the layers are not called one by one, or they
            give something else when they are called again with the same.
    """
    recorder = _Recorder(layers, activations, stand_in, goes_on=not feed.runs_layers)
    real: list[RealTokens] = []
    parameters = [*signature(layers[0].forward).parameters]
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(replaced(layer, "forward", recorder.forward(index, layer.forward)))
        # The first batch goes on behind the layers of a language model, to see that none is called again, but not
        # through the head. Of other models that is known before.
        if feed.head is not None:
            stack.enter_context(replaced(feed.head, "forward", _stop))
        for number, batch in enumerate(batches):
            recorder.start_batch()
            with suppress(_DryRunDoneError):
                feed.run(batch)
            recorder.end_batch()
            of_first = recorder.arguments[0][number].by_name(parameters)
            real.append(feed.real_tokens(batch, recorder.hidden_BTD.shapes[number], of_first))
    if not real:
        raise ValueError("the calibration set is empty: at least one batch of input_ids is needed")
    if not any(tokens.mask_BT is None or bool(tokens.mask_BT.any()) for tokens in real):
        raise ValueError("the calibration set holds padding only: attention_mask is 0 everywhere")
    if recorder.last_output is not None:
        _check_repeats(layers, recorder)
    return recorder.hidden_BTD, recorder.arguments, real


def _check_repeats(layers: list[nn.Module], recorder: _Recorder) -> None:
    """Make sure that layers give again what they gave: else what is gathered later is not what the model computes."""
    hidden = recorder.hidden_BTD[0]
    for layer, arguments in zip(layers, recorder.arguments, strict=True):
        hidden = hidden_states_of(arguments[0].call(layer, hidden))
    expected = cast(Tensor, recorder.last_output)
    if not is_the_same(hidden, expected):
        raise ValueError(
            "layers give something else when they are called again with what the model passed to them (a cache, "
            "randomness, or states that they change in place): they cannot be pruned one by one"
        )


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
