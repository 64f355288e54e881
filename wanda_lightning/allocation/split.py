"""The cheapest way to reach a total: one choice for each part, exact, by dynamic programming."""

import math
from collections.abc import Sequence

import torch

FINEST = 100_000
"""Units that the total is counted in at most: odd shapes are rounded to it, by up to half a unit for each part."""


def cheapest_split(
    costs: Sequence[Sequence[float]], gains: Sequence[Sequence[int]], total: int, over: bool = False
) -> list[int]:
    """Choose one option for each part, so that the gains sum to a total and the costs to the least that there is.

    Args:
        costs: Of each option of each part; infinite where it cannot be chosen.
        gains: Of the same options, whole numbers, at least 0.
        total: What the gains have to sum to.
        over: Whether they may also sum to more.

    Returns:
        The number of the option chosen for each part; among equals the one with the least gain, in the last part first.

    Raises:
        ValueError: If no choice reaches the total.

    Examples:
        >>> cheapest_split([[0, 1, 4], [0, 2, 8]], [[0, 1, 2], [0, 1, 2]], total=3)
        [2, 1]
    """
    unit = math.gcd(total, *(gain for options in gains for gain in options)) or 1
    most = sum(max(options) for options in gains)
    if most / unit > FINEST:
        unit = -(-most // FINEST)
    counts = [[gain // unit if over else round(gain / unit) for gain in options] for options in gains]
    size = sum(max(options) for options in counts) + 1
    wanted = min(-(-total // unit) if over else round(total / unit), size - 1)
    least = torch.full((size,), math.inf, dtype=torch.float64, device="cpu")
    least[0] = 0
    chosen = []
    for part, options in zip(costs, counts, strict=True):
        reached = torch.full((len(part), size), math.inf, dtype=torch.float64, device="cpu")
        for number, (cost, count) in enumerate(zip(part, options, strict=True)):
            reached[number, count:] = least[: size - count] + cost
        least, option = reached.min(0)
        chosen.append(option.to(torch.int16))
    at = wanted + int(least[wanted:].argmin()) if over else wanted
    if total > most or not math.isfinite(least[at]):
        raise ValueError(f"no choice reaches a total of {total}: the most that there is to gain is {most}")
    picked = []
    for options, option in zip(reversed(counts), reversed(chosen), strict=True):
        picked.append(int(option[at]))
        at -= options[picked[-1]]
    return picked[::-1]
