"""The numbers of a config that describe a model's shape, found by value and by what they do; no name is known.

A config with another number in it is tried out: its model is built on the meta device, where it takes no memory, and
its shapes are compared with those that are wanted.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import nn

from wanda_lightning.model.linears import own_modules

log = logging.getLogger(__name__)

Path = tuple[str, ...]
Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> Shapes:
    """Return the shapes of a model's parameters by name."""
    return {
        f"{name}.{parameter}": tuple(values.shape)
        for name, module in own_modules(model)
        for parameter, values in module.named_parameters(recurse=False)
    }


def skeleton(model: nn.Module, config: Any = None) -> nn.Module:
    """Build a model of the same class on the meta device.

    Args:
        model: The model.
        config: A config of the same class. It is written and read back, as in a folder. Default: the model's own.

    Returns:
        The model without values.
    """
    config = model.config if config is None else config
    again = type(config).from_dict(config.to_dict())
    again._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        return type(model)(again)


def numbers(config: Any, wanted: int | None, path: Path = ()) -> Iterator[Path]:
    """Find where a config says a number, or nothing at all, also in lists and in the configs that it holds.

    Args:
        config: A config of transformers.
        wanted: The number; None finds what is not said.
        path: The names that lead to it.

    Yields:
        The names that lead to such a number, those of inner configs last.
    """
    inner = []
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            inner.append((name, value))
        elif value is None if wanted is None else (_is(value, wanted) or _in(value, wanted)):
            yield (*path, name)
    for name, value in inner:
        yield from numbers(value, wanted, (*path, name))


def change(config: Any, path: Path, before: int, after: int) -> None:
    """Replace a number in a config, in place.

    Args:
        config: A config of transformers.
        path: The names that lead to the number, or to a list with it.
        before: The number; ignored where none is said.
        after: What takes its place.
    """
    owner = reduce(getattr, path[:-1], config)
    value: Any = getattr(owner, path[-1], None)
    after_all = [after if _is(each, before) else each for each in value] if _in(value, before) else after
    setattr(owner, path[-1], after_all)


def says(config: Any, path: Path, number: int) -> bool:
    """Whether a config says a number at some place, or has a list with it there."""
    value = reduce(lambda owner, name: getattr(owner, name, None), path, config)
    return _is(value, number) or _in(value, number)


def find_numbers(
    model: nn.Module,
    sizes: Mapping[int, int],
    wanted: Shapes,
    also: Callable[[Any, Path], None] | None = None,
) -> dict[Path, tuple[int, int]]:
    """Find the numbers in a model's config that give its parameters other shapes.

    A number is right if all that it changes becomes what is wanted.

    Args:
        model: The model; it does not change.
        sizes: What numbers are to be, by what they are. Where the config says no such number, one that is not said at
            all may do, unless there is more to change.
        wanted: The shapes of all parameters then.
        also: Changes what else has to change in a config, given the names that lead to the number.

    Returns:
        By the names that lead to a number, what it is and what it is to be.

    Raises:
        ValueError: If the config has no such numbers, or too many.
    """
    config: Any = copy.deepcopy(model.config)
    is_now = shapes_of(skeleton(model))
    shapes, found = {**is_now}, dict[Path, tuple[int, int]]()
    tried = [(path, size) for size in sizes.items() for path in numbers(config, size[0])]
    unsaid = ((path, size) for size in sizes.items() if also is None for path in numbers(config, None))
    alike: dict[frozenset[str], Path] = {}
    for path, (before, after) in chain(tried, unsaid):
        if shapes == wanted and path not in dict(tried):
            break
        then = _shapes_with(model, path, before, after, also)
        changed = frozenset(name for name in {**is_now, **then} if then.get(name) != is_now.get(name))
        if not then or not changed or any(then.get(name) != wanted.get(name) for name in changed):
            continue
        if changed in alike:
            names = " and ".join(".".join(each) for each in (alike[changed], path))
            raise ValueError(f"{type(config).__name__} says {before} in {names}, and either would give these shapes")
        alike[changed], found[path] = path, (before, after)
        shapes = {n: shape for n, shape in shapes.items() if n not in changed} | {
            name: then[name] for name in changed if name in then
        }
    if shapes != wanted:
        name = next(name for name in [*wanted, *shapes] if shapes.get(name) != wanted.get(name))
        raise ValueError(
            f"no number in {type(config).__name__} makes {name} {wanted.get(name, 'go')} and leaves all else as it is "
            f"or has to be, so the smaller model could not be loaded again; tried {_listed(path for path, _ in tried)}"
        )
    return found


def set_number(model: nn.Module, path: Path, before: int, after: int) -> None:
    """Change a number in the configs that a model and its modules hold, which are mostly one.

    Args:
        model: The model.
        path: The names that lead to the number in the model's own config.
        before: What it is.
        after: What it is to be.
    """
    config: Any = model.config
    change(config, path, before, after)
    kind = type(reduce(getattr, path[:-1], config))
    for each in (getattr(module, "config", None) for module in model.modules()):
        value = getattr(each, path[-1], None) if type(each) is kind else None
        if _is(value, before) or _in(value, before):  # a copy; what is the same object has changed already
            change(each, path[-1:], before, after)


def take_over(model: nn.Module, before: nn.Module, after: nn.Module, apart_from: str | None = None) -> None:
    """Take over what modules keep of their own sizes, such as ``intermediate_size``.

    Args:
        model: The model that has changed.
        before: A skeleton as it was built.
        after: One as it would be built now.
        apart_from: Name of a part to leave alone.
    """
    old, new = dict(own_modules(before)), dict(own_modules(after))
    for name, module in own_modules(model):
        if apart_from and f"{name}.".startswith(f"{apart_from}."):
            continue
        for attribute, value in vars(new[name]).items():
            was = vars(old[name]).get(attribute)
            if type(value) is int and value != was and vars(module).get(attribute) == was:
                setattr(module, attribute, value)


def _shapes_with(
    model: nn.Module, path: Path, before: int, after: int, also: Callable[[Any, Path], None] | None
) -> Shapes:
    """Return the shapes of the model that a config with another number describes; none if it describes nothing."""
    config = copy.deepcopy(model.config)
    try:
        if also is not None:
            also(config, path)
        change(config, path, before, after)
        return shapes_of(skeleton(model, config))
    except Exception as error:  # whatever a config or model makes of a number that is none of its own
        log.debug("%s is not that number: %r", ".".join(path), error)
        return {}


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(".".join(path) for path in paths) or "none, as none is of that size"


def _is(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def _in(value: Any, number: int) -> bool:
    return isinstance(value, list) and any(_is(each, number) for each in value)
