"""JSON files that every parser takes: NaN and infinity, which JSON does not have as numbers, are their names."""

import json
import math
from pathlib import Path
from typing import Any

from wanda_lightning.atomic_files import write_text

NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""As JavaScript, Protocol Buffers and pandas call them; any language makes numbers of them again."""


def to_json(plain: Any) -> str:
    """Write plain types as JSON.

    Args:
        plain: Dictionaries, lists, texts, numbers.

    Returns:
        The text of a file; numbers that are not finite are texts in it.

    Example:
        >>> print(to_json([1.5, float("inf")]), end="")
        [
          1.5,
          "Infinity"
        ]
    """
    return json.dumps(_named(plain), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, plain: Any) -> None:
    """Write a file as :func:`to_json` has it, whole or not at all."""
    write_text(path, to_json(plain))


def read_json(path: Path) -> Any:
    """Read a file that :func:`write_json` wrote, or an older version, which had numbers no other parser knows.

    Args:
        path: The file.

    Returns:
        Plain types; the names of numbers that are not finite are these numbers again.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON.
    """
    return _as_numbers(json.loads(path.read_text(encoding="utf-8")))


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_named(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _as_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [*map(_as_numbers, value)]
    return NAMES.get(value, value) if isinstance(value, str) else value
