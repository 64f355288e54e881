"""How a model calls a layer, and what the layer gives. Shapes: B batch, T tokens, D hidden size."""

import copy
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wanda_lightning.calibration.modes import Modes


class Arguments(NamedTuple):
    """What a model passes to a layer beside the hidden states.

    Attributes:
        args: Positional arguments behind the hidden states.
        kwargs: Keyword arguments.
        keyword: The name under which the hidden states are passed; None where they are the first argument.
        modes: What the model is within where it calls the layer, such as autocast.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None = None
    modes: Modes = Modes({}, [])

    def call(self, layer: Callable[..., Any], hidden: Tensor) -> Any:
        """Call a layer as the model does, with these hidden states."""
        with self.modes.entered():
            if self.keyword is None:
                return layer(hidden, *self.args, **self.kwargs)
            return layer(*self.args, **{self.keyword: hidden}, **self.kwargs)

    def by_name(self, parameters: Iterable[str]) -> dict[str, Any]:
        """Return the arguments by the names of the layer's parameters, as far as these can be told."""
        names = [*parameters][self.keyword is None :]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """Tell the hidden states that enter a layer from its other arguments: the first tensor, by position or name.

    Args:
        args: Positional arguments of a call.
        kwargs: Its keyword arguments.

    Returns:
        The hidden states, and the others.

    Raises:
        ValueError: If there is no tensor.
    """
    if args:
        return args[0], Arguments(args[1:], kwargs, modes=Modes.now())
    tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    keyword = "hidden_states" if "hidden_states" in kwargs else next(iter(tensors), None)
    if keyword is None:
        raise ValueError("a layer is called without hidden states: it cannot be pruned by itself")
    others = {name: value for name, value in kwargs.items() if name != keyword}
    return kwargs[keyword], Arguments((), others, keyword, Modes.now())


def hidden_states_of(out: Any) -> Tensor:
    """Return the hidden states (B, T, D) of what a layer gives: that may be a tuple or list that starts with them.

    Args:
        out: What it gives.

    Returns:
        The hidden states.

    Raises:
        ValueError: If it is anything else.
    """
    hidden = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"a layer gives {type(out).__name__}: only layers that give hidden states, alone or first in a tuple or "
            "list, can be pruned layer by layer"
        )
    return hidden


def without_hidden(out: Any) -> Any:
    """Return what a layer gives beside the hidden states, for :func:`with_hidden`; None where that is nothing."""
    return rebuilt(out, [None, *out[1:]]) if isinstance(out, tuple | list) else None


def with_hidden(beside: Any, hidden: Tensor) -> Any:
    """Return what a layer gives: hidden states, and what is beside them."""
    return hidden if beside is None else rebuilt(beside, [hidden, *beside[1:]])


def called(forward: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the forward of a layer as the model does.

    Args:
        forward: The forward.
        hidden: The hidden states among its arguments.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        What it gives, hidden states (B, T, D) or a tuple or list that starts with them.

    Raises:
        ValueError: If it changes in place what enters it, or gives something else.
    """
    version = hidden._version
    out = forward(*args, **kwargs)
    if hidden._version != version:
        raise ValueError(
            "layers change in place what enters them, and calibration calls them again with it: write x = x + y in "
            "them, not x += y"
        )
    hidden_states_of(out)
    return out


def rebuilt(given: tuple[Any, ...] | list[Any], values: Sequence[Any]) -> Any:
    """Put other values into a tuple, named tuple or list."""
    return type(given)(*values) if hasattr(given, "_fields") else type(given)(values)


def with_own_mappings(call: Arguments, copies: dict[int, MutableMapping[Any, Any]]) -> Arguments:
    """Copy the mappings among arguments that layers may write to.

    Args:
        call: The arguments.
        copies: Those that there are already, by the ``id`` of what was copied.

    Returns:
        The arguments with copies.
    """

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), copy.copy(value)) if isinstance(value, MutableMapping) else value

    return call._replace(args=tuple(map(own, call.args)), kwargs={name: own(x) for name, x in call.kwargs.items()})


def of_another(hidden: Tensor) -> Tensor:
    """Make up hidden states that could be those of another batch."""
    return 1.5 * hidden.flip(-1)


@torch.no_grad()
def is_the_same(one_BTD: Tensor, other_BTD: Tensor) -> bool:
    """Whether two hidden states differ by rounding only, on the mean over tokens.

    Sums may have another order each time, as those over experts on a GPU have, and half precision then decides
    otherwise for single tokens. A few of them are far larger than the others, so each counts by its own size.
    """
    difference_BT = torch.linalg.vector_norm(one_BTD.float() - other_BTD.float(), dim=-1)
    size_BT = torch.linalg.vector_norm(other_BTD.float(), dim=-1)
    relative_BT = difference_BT / size_BT.clamp_min(1e-3 * float(size_BT.mean()) + torch.finfo(torch.float32).tiny)
    return not bool(relative_BT.mean() > (1e-3 if other_BTD.itemsize > 2 else 0.05))
