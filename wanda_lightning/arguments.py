"""What users give, checked in one way everywhere: numbers most of all, data types and devices."""

import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast, get_args

if TYPE_CHECKING:  # the command line names data types before torch is imported
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
"""The data types to load or to compute in; ``"auto"`` is the checkpoint's own."""


def plain(value: Any) -> Any:
    """Make what reports and checkpoints can hold of numbers of another kind, such as numpy's, and of paths.

    Args:
        value: Anything.

    Returns:
        The same as one of Python's numbers, or as text, also within dictionaries and lists; anything else as it is. A
        number of half or single precision is what its decimals say: numpy's float32 has a little less for 0.7, which
        would prune 69 weights of 100.

    Example:
        >>> import numpy
        >>> plain(numpy.float32(0.7)), plain(numpy.int64(8)), plain("2:4")
        (0.7, 8, '2:4')
    """
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [*map(plain, value)]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(str(value)) if hasattr(value, "dtype") else float(value)


def plain_fields(settings: object) -> None:
    """Make Python's numbers, see :func:`plain`, of those in a dataclass, also a frozen one."""
    for name, value in vars(settings).items():
        object.__setattr__(settings, name, plain(value))


def attributes_of(owner: object) -> dict[str, Any]:
    """Return the attributes of a method or an allocation; those that begin with an underscore are no settings."""
    return {name: value for name, value in vars(owner).items() if not name.startswith("_")}


def as_call(owner: object, settings: dict[str, Any]) -> str:
    """Write an object as the call that makes it: its class and its settings."""
    return f"{type(owner).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def without_addresses(text: str) -> str:
    """Leave out of a text where objects are in memory, which every process says otherwise."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def is_whole(value: object, least: int) -> bool:
    """Tell whether a value is a whole number of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: object) -> TypeGuard[float]:
    """Tell whether a value is a number, and finite; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_fraction(value: object) -> TypeGuard[float]:
    """Tell whether a value is a number in [0, 1), as a sparsity is; True and False are none."""
    return is_finite(value) and 0 <= value < 1


def meant_sparsity(value: object) -> str:
    """Guess what a sparsity or pattern that cannot be used was meant to be; empty if nothing comes to mind."""
    if isinstance(value, str) and re.fullmatch(r"\d+:\d+", value):
        return f'; write pattern="{value}"'
    try:
        number = float(cast(Any, value))
    except (TypeError, ValueError):
        return ""
    if 1 < number < 100:
        return f"; write {number / 100:g} to prune {number:g} %"
    return f"; write {number:g} to prune {100 * number:g} %" if 0 <= number < 1 and isinstance(value, str) else ""


def whole_number(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number, or too small.

    Args:
        name: What users call the value.
        value: What they gave.
        least: The smallest that is accepted.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> whole_number("batch_size", 0, least=1)
        Traceback (most recent call last):
            ...
        ValueError: batch_size must be a whole number of at least 1, got 0
    """
    if not is_whole(value, least):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def positive_number(name: str, value: object) -> None:
    """Refuse what is not a finite number above 0, as :func:`whole_number` does."""
    if not is_finite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def positive_up_to(name: str, value: object, most: float, what: str = "number") -> None:
    """Refuse what is not a number above 0, or too large.

    Args:
        name: What users call the value.
        value: What they gave.
        most: The largest that is accepted.
        what: What the number is.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> positive_up_to("keep", 1.5, 1, "fraction of the neurons")
        Traceback (most recent call last):
            ...
        ValueError: keep must be a fraction of the neurons in (0, 1], got 1.5
    """
    if not is_finite(value) or not 0 < value <= most:
        raise ValueError(f"{name} must be a {what} in (0, {most:g}], got {value!r}")


def number_not_below_0(name: str, value: object) -> None:
    """Refuse what is not a finite number of at least 0, as :func:`whole_number` does."""
    if not is_finite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def one_of(name: str, value: object, kind: Any) -> None:
    """Refuse what is none of the values of a ``Literal``, as :func:`whole_number` does."""
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")


def instance_or_none(name: str, value: object, kinds: type | tuple[type, ...], example: str) -> None:
    """Refuse what is of another class.

    Args:
        name: What users call the value.
        value: What they gave; None where they gave nothing.
        kinds: A class, or several.
        example: How such a value is written.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> instance_or_none("reconstruction", True, tuple, "Reconstruction(epochs=3)")
        Traceback (most recent call last):
            ...
        ValueError: reconstruction must be something like Reconstruction(epochs=3), got True
    """
    if value is not None and not isinstance(value, kinds):
        raise ValueError(f"{name} must be something like {example}, got {value!r}")


def several(name: str, value: object) -> None:
    """Refuse what is no list, such as one name where several are asked for, as :func:`whole_number` does."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list, got {value!r}")


def checked_dtype(dtype: "str | torch.dtype") -> "torch.dtype | None":
    """Find the data type that is meant.

    Args:
        dtype: A name, or what torch has under it.

    Returns:
        The data type; None for ``"auto"``.

    Raises:
        ValueError: If nothing can be loaded and computed in it.

    Example:
        >>> checked_dtype("bfloat16")
        torch.bfloat16
    """
    import torch

    name = str(dtype).removeprefix("torch.")
    if name not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    return None if name == "auto" else getattr(torch, name)


def checked_device(device: "torch.device | str | None") -> "torch.device":
    """Find the device that is meant.

    Args:
        device: A name, such as ``cpu`` or ``cuda:0``, or what torch has under it. Default: the GPU, if there is one
            that torch can use.

    Returns:
        The device.

    Raises:
        ValueError: If it cannot be used here.
    """
    import torch

    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(device)
