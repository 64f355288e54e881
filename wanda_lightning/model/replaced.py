"""An attribute of a model or a module that is another one for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute, and put back what was there, also if that was its class's.

    Args:
        owner: Any object with a ``__dict__``.
        name: The attribute.
        value: Its value meanwhile.
    """
    own = dict(vars(owner))  # accelerate keeps its hooks in a forward of the object's own
    setattr(owner, name, value)
    try:
        yield
    finally:
        if name in own:
            setattr(owner, name, own[name])
        else:
            delattr(owner, name)
