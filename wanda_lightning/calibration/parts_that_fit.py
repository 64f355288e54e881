"""Which linears have their statistics gathered together, where those of a whole layer do not fit in memory."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def parts_that_fit(groups: Sequence[Sequence[T]], sizes: Sequence[int], memory: int) -> list[list[T]]:
    """Split groups, in order, into parts whose sizes fit into memory together.

    Args:
        groups: What is not to be parted, such as linears that share one Hessian.
        sizes: Bytes that each group takes.
        memory: Bytes that a part may take; as many as the largest group takes, if that is more.

    Returns:
        The members of the groups, part by part.

    Example:
        >>> parts_that_fit(["qkv", "o", "gu", "d"], [4, 4, 4, 16], memory=1)
        [['q', 'k', 'v', 'o', 'g', 'u'], ['d']]
    """
    limit = max(memory, *sizes)
    parts: list[list[T]] = []
    left = 0
    for group, size in zip(groups, sizes, strict=True):
        if size > left:
            parts.append([])
            left = limit
        parts[-1] += group
        left -= size
    return parts
