"""Which lists of layers a model calls one layer after another, and in which order: seen while it runs once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from wanda_lightning.calibration.call_order import is_passed_on
from wanda_lightning.calibration.calls import hidden_states_of, split
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.calibration.stand_ins import LayerForward, standing_in
from wanda_lightning.model.hooks import before_calls
from wanda_lightning.model.stacks import lists_of_layers, no_stacks, without_nested


class _Watched:
    """A list of layers whose calls are watched.

    Args:
        layers: The layers.
        is_named: Whether the user says that it is one: then something may happen to what one layer gives to the next.

    Attributes:
        fault: Why its layers are not called one after another, once or several times; None if they are.
    """

    def __init__(self, layers: Sequence[nn.Module], is_named: bool) -> None:
        self.layers, self._is_named = layers, is_named
        self.fault: str | None = None if len({*layers}) == len(layers) else "a layer is in it several times"
        self._reached = 0  # layers that have been called
        self._passed: Any = None

    def enters(self, index: int, hidden: Any) -> None:
        """Note that a layer is called."""
        if self.fault is None:
            if index > self._reached:
                self.fault = f"layer {index} is called where layer {self._reached} would be next"
            elif not isinstance(hidden, Tensor):
                self.fault = f"layer {index} is not called with a tensor"
            elif index and not self._is_named and not is_passed_on(self._passed, hidden):
                self.fault = (
                    f"layer {index} is not called with what the layer before it gave; name the list with layers if it "
                    "is to be pruned"
                )
        self._reached = max(self._reached, index + 1)

    def leaves(self, out: Any) -> None:
        """Note what a layer gave."""
        try:
            self._passed = hidden_states_of(out)
        except ValueError as error:
            self.fault = self.fault or str(error)

    def end(self) -> None:
        """Note that the model has run."""
        if self.fault is None and self._reached < len(self.layers):
            self.fault = f"{self._reached} of its {len(self.layers)} layers are called"


def called_stacks(
    feed: Feed, batch: Any, named: Sequence[str] | None = None
) -> tuple[list[str], Callable[[nn.Module], int]]:
    """Run a model once, whole, and see which of its lists of layers are called one layer after another.

    Args:
        feed: Runs the model.
        batch: A calibration batch.
        named: Names of lists, where the user says which they are. Default: all, and of such that lie in one another
            the inner ones if the outer ones consist of them.

    Returns:
        The names of the lists, in the order in which they are called; and what gives the place of any module's first
        call among those of all modules.

    Raises:
        ValueError: If there are none, or one that is named is not called in this way, with the reason.
    """
    if not (lists := lists_of_layers(feed.model, named)):
        raise no_stacks(feed.model)
    watched = {
        name: _Watched([*cast(Any, found)._modules.values()], named is not None) for name, found in lists.items()
    }
    order = _run(feed, batch, watched)
    fit = {name: lists[name] for name, each in watched.items() if each.fault is None}
    faults = "; ".join(f"{name}: {each.fault}" for name, each in watched.items() if each.fault)
    if not fit or (named is not None and faults):
        raise ValueError(f"{type(feed.model).__name__} cannot be pruned layer by layer: {faults}")
    names = [*fit] if named is not None else without_nested(fit)
    return sorted(names, key=lambda name: order(watched[name].layers[0])), order


def _run(feed: Feed, batch: Any, watched: Mapping[str, _Watched]) -> Callable[[nn.Module], int]:
    """Run the model on a batch, under watch; return the order of calls."""
    order: dict[nn.Module, int] = {}
    lists: dict[nn.Module, list[tuple[_Watched, int]]] = {}
    for each in watched.values():
        for index, layer in enumerate(each.layers):
            lists.setdefault(layer, []).append((each, index))

    def note(module: nn.Module, *_: Any) -> None:
        order.setdefault(module, len(order))

    def watching(number: int, forward: LayerForward) -> LayerForward:
        places = [*lists.values()][number]

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = args or any(isinstance(value, Tensor) for value in kwargs.values())
            hidden = split(args, kwargs)[0] if tensors else None
            for each, index in places:
                each.enters(index, hidden)
            out = forward(*args, **kwargs)
            for each, _ in places:
                each.leaves(out)
            return out

        return call

    with before_calls(feed.model.modules(), note), standing_in([*lists], watching):
        feed.run(batch)
    for each in watched.values():
        each.end()
    return lambda module: order.get(module, len(order))
