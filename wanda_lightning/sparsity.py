"""Sparsity patterns: which of a set of scores are pruned, and how many.

Masks are boolean, True = kept. N:M means N *kept* of every M consecutive inputs.
Shapes: G comparison groups, N scores in a group, O out features, I in features.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from wanda_lightning.arguments import is_finite, is_fraction, is_whole, meant_sparsity, plain, plain_fields
from wanda_lightning.lowest_scores import prune_lowest

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes, the integers that are as long as another number."""


@dataclass(frozen=True)
class Unstructured:
    """Prune the lowest-scored fraction of every comparison group, wherever it lies.

    Args:
        sparsity: Fraction of weights to prune, in [0, 1).

    Raises:
        ValueError: If ``sparsity`` is not a number in [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        plain_fields(self)
        if not is_fraction(self.sparsity):
            raise ValueError(
                f"sparsity must be a number in [0, 1), got {self.sparsity!r}{meant_sparsity(self.sparsity)}"
            )

    def mask(self, score_GN: Tensor) -> Tensor:
        """Keep all but the lowest scores of each row, as many as :meth:`count` says; ties go by position.

        Args:
            score_GN: Importance of each weight, shape (groups, weights in a group); higher is kept.

        Returns:
            Boolean mask of the same shape, True = kept.
        """
        return prune_lowest(score_GN, self.count(score_GN.shape[-1]))

    def count(self, weights: int) -> int:
        """Say how many of so many weights go, rounded down; of 100 with 0.58, whose float64 is a little less, 58."""
        return math.floor(self.sparsity * weights * (1 + 1e-15))

    def check_in_features(self, in_features: int, name: str) -> None:
        """Accept every number of input features: this pattern divides nothing."""

    def check_mask(self, mask_OI: Tensor, tolerance: float) -> None:
        """Refuse a mask that prunes more or fewer weights than asked for, up to ``tolerance`` (a fraction).

        Args:
            mask_OI: True = kept.
            tolerance: How far its sparsity may be from what was asked for.

        Raises:
            ValueError: If it is further.
        """
        achieved = sparsity_of(mask_OI)
        if abs(achieved - self.sparsity) > tolerance:
            raise ValueError(f"sparsity {achieved} is not {self.sparsity} +- {tolerance}")

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class SemiStructured:
    """Keep the ``n`` highest-scored weights of every ``m`` consecutive inputs (N:M sparsity).

    Args:
        n: Weights kept in each group, 1 <= n < m.
        m: Group size.

    Raises:
        ValueError: If not 1 <= n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        plain_fields(self)
        if not is_whole(self.n, 1) or not is_whole(self.m, self.n + 1):
            raise ValueError(f"an N:M pattern keeps n of every m weights with 1 <= n < m, got {self.n!r}:{self.m!r}")

    @property
    def sparsity(self) -> float:
        """Fraction of weights pruned."""
        return (self.m - self.n) / self.m

    def mask(self, score_GN: Tensor) -> Tensor:
        """Keep the ``n`` highest of every ``m`` consecutive scores; ties go by position.

        Args:
            score_GN: Importance of each weight, shape (groups, weights); N is a multiple of m.

        Returns:
            Boolean mask of the same shape, True = kept.
        """
        return prune_lowest(score_GN.reshape(-1, self.m), self.m - self.n).view(score_GN.shape)

    def count(self, weights: int) -> int:
        """Say how many of so many weights go."""
        return weights // self.m * (self.m - self.n)

    def check_in_features(self, in_features: int, name: str) -> None:
        """Refuse a linear whose inputs do not divide into groups of m.

        Args:
            in_features: Inputs of the linear.
            name: Name of the linear.

        Raises:
            ValueError: If ``in_features`` is not a multiple of m.
        """
        if in_features % self.m:
            raise ValueError(
                f"{name} has {in_features} input features, which do not divide into groups of {self.m}: "
                f"{self} needs a multiple of {self.m} (exclude it with ignore, or use another pattern)"
            )

    def check_mask(self, mask_OI: Tensor, tolerance: float = 0.0) -> None:
        """Refuse a mask of which a group of m does not keep exactly n, see :meth:`Unstructured.check_mask`."""
        if not (mask_OI.reshape(-1, self.m).sum(1) == self.n).all():
            raise ValueError(f"a group of {self.m} does not keep exactly {self.n}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | SemiStructured


def parse_pattern(pattern: str, sparsity: float | None = None) -> Pattern:
    """Read a pattern as users write it.

    Args:
        pattern: ``"unstructured"``, or ``"n:m"`` to keep n of every m consecutive inputs.
        sparsity: Fraction to prune. Unstructured: 0.5 unless given. N:M fixes it at 1 - n/m; another value is refused.

    Returns:
        The pattern.

    Raises:
        ValueError: If the pattern cannot be read, or contradicts ``sparsity``.
    """
    sparsity = plain(sparsity)
    if pattern == "unstructured":
        return Unstructured(0.5 if sparsity is None else sparsity)
    kept, colon, size = pattern.partition(":") if isinstance(pattern, str) else ("", "", "")
    if not (colon and kept.isdecimal() and size.isdecimal()):
        # PyYAML reads an unquoted 2:4 as a base-60 number: 2 * 60 + 4.
        hint = ""
        if str(pattern).isdecimal() and int(pattern) >= 60:
            meant = f"{int(pattern) // 60}:{int(pattern) % 60}"
            hint = f'; YAML reads an unquoted {meant} as this number, write pattern: "{meant}"'
        hint += meant_sparsity(pattern)
        raise ValueError(f'pattern must be "unstructured" or "n:m" such as "2:4", got {pattern!r}{hint}')
    semi_structured = SemiStructured(int(kept), int(size))
    agrees = sparsity is None or (is_finite(sparsity) and math.isclose(sparsity, semi_structured.sparsity))
    if not agrees:
        raise ValueError(
            f"pattern {pattern} keeps {kept} of every {size} weights, a sparsity of {semi_structured.sparsity:g}, "
            f"got sparsity={sparsity!r}: leave sparsity out, or use pattern='unstructured'"
        )
    return semi_structured


def as_pattern(pattern: Pattern | str | float) -> Pattern:
    """Take a pattern in every form in which users give one.

    Args:
        pattern: ``Unstructured(0.5)`` or ``SemiStructured(2, 4)``; a sparsity in [0, 1); or what :func:`parse_pattern`
            reads.

    Returns:
        The pattern.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> as_pattern(0.5), as_pattern("2:4")
        (Unstructured(sparsity=0.5), SemiStructured(n=2, m=4))
    """
    pattern = plain(pattern)
    if isinstance(pattern, Unstructured | SemiStructured):
        return pattern
    if isinstance(pattern, str) or is_whole(pattern, 60):  # a number as large is what YAML makes of n:m
        return parse_pattern(cast(str, pattern))
    if isinstance(pattern, bool) or not isinstance(pattern, int | float):
        raise ValueError(
            'pattern must be a sparsity such as 0.5, "n:m" such as "2:4", "unstructured", Unstructured(0.5) or '
            f"SemiStructured(2, 4), got {pattern!r}"
        )
    return Unstructured(pattern)


def sparsity_of(tensor: Tensor) -> float:
    """Measure the fraction of zeros (of a weight) or of pruned entries (of a mask)."""
    return 1 - nonzeros(tensor) / max(tensor.numel(), 1)


def nonzeros(tensor: Tensor) -> int:
    """Count what is not zero; as booleans, which are counted faster, and which float8 can be turned into."""
    return int(torch.count_nonzero(tensor.bool()))


def zero_where_pruned(weight: Tensor, mask: Tensor) -> None:
    """Set weights to 0 where a mask has False, in place.

    The bits are multiplied by 1 or 0: several times as fast on a CPU as ``masked_fill_``, and no -0 or NaN comes of it.

    Args:
        weight: Weights, any floating dtype of 16 bits or more.
        mask: True = kept, the same shape.
    """
    weight.view(INTEGERS[weight.element_size()]).mul_(mask)


def max_kept_per_group(mask_OI: Tensor, m: int) -> int:
    """Count the kept weights of the fullest group of m consecutive inputs; n:m holds for every n from there on."""
    return int(mask_OI.unflatten(-1, (-1, m)).sum(-1, dtype=torch.int16).max())
