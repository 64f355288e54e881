"""Seeing what modules are called with, for a while."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def before_calls(
    modules: Iterable[nn.Module], see: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Show every call of some modules before it runs.

    Args:
        modules: The modules.
        see: Is given the module, its positional and its keyword arguments; what it raises, the call raises.
    """
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield
