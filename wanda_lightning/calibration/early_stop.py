"""Leaving a layer once the last module of interest has its input: its product and what follows are not needed."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn


class _AllInputsSeenError(Exception):
    pass


class EarlyStop:
    """Cuts a forward short after its last call of some modules.

    That is known only where every module is called exactly once: so it was before, with inputs of the same shape.

    Args:
        modules: The modules of interest.
        works: Whether it may be used: not where a router decides which modules are called.
    """

    def __init__(self, modules: Collection[nn.Module], works: bool) -> None:
        self._number = len(modules)
        self._works = works
        self._once_each: set[tuple[int, ...]] = set()
        self._shape: tuple[int, ...] = ()
        self._calls: list[nn.Module] = []

    @contextmanager
    def after_the_last_call(self, shape: tuple[int, ...]) -> Iterator[None]:
        """Bracket one forward with inputs of a shape; it ends after the last call."""
        self._shape = shape
        self._calls.clear()
        try:
            yield
        except _AllInputsSeenError as stop:
            stop.__traceback__ = None  # from Python 3.12 on a circle: it holds frames of contextlib, and they hold it
        if self._works and len(self._calls) == self._number == len(set(self._calls)):
            self._once_each.add(shape)

    def called(self, module: nn.Module) -> None:
        """Note that a module of interest is about to run."""
        self._calls.append(module)
        if self._shape in self._once_each and len(set(self._calls)) == self._number:
            raise _AllInputsSeenError
