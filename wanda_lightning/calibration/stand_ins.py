"""Stand-ins for the layers of a model while it runs, and an early end of such a run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

from torch import nn

from wanda_lightning.model.replaced import replaced

LayerForward = Callable[..., Any]


class EnoughSeenError(Exception):
    """What follows in the model need not run."""


@contextmanager
def standing_in(layers: Sequence[nn.Module], stand_in: Callable[[int, LayerForward], LayerForward]) -> Iterator[None]:
    """Let layers have another forward for a while.

    Args:
        layers: The layers.
        stand_in: Given the place of a layer and its forward, the other one.
    """
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(replaced(layer, "forward", stand_in(index, layer.forward)))
        yield


def ending_at(head: nn.Module | None) -> AbstractContextManager[None]:
    """Let runs of a model end with :class:`EnoughSeenError` where it would call its head, if that is known."""
    return nullcontext() if head is None else replaced(head, "forward", _end)


def _end(*_: Any, **__: Any) -> NoReturn:
    raise EnoughSeenError
