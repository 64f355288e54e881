"""Where a curve leaves a budget: a search over whole numbers that knows nothing of what costs."""

import math
from collections.abc import Callable, Mapping

POWER = 3.0  # how steep the curve is taken to be while one point of it is known: log perplexity grows about so


def last_within(cost: Callable[[int], float], budget: float, end: int) -> int:
    """Find the last whole number whose cost is within a budget, with few evaluations of the cost.

    Regula falsi on a power law through the two points that enclose the place; when two such steps have not halved what
    is left, the next one bisects. So the cost is evaluated at most ``3 * ceil(log2(end))`` times, whatever it is, and
    less often than by bisection alone on most smooth curves.

    Args:
        cost: What a number costs. That of 0 is 0, and is not asked for. NaN and inf are over every budget.
        budget: What it may cost, at least 0.
        end: The numbers are those below it; at least 1.

    Returns:
        Where the cost never falls: the largest number below ``end`` whose cost is within the budget. Else a number
        where the curve leaves the budget: its cost is within, that of the next one is not, or the next one is ``end``.
        There may be others, smaller or larger.

    Examples:
        >>> last_within(lambda number: number**2, 10, 100)
        3
    """
    within, beyond = 0, end
    costs = {0: 0.0}
    slow = 0  # steps since what is left was last halved
    width = end
    while beyond - within > 1:
        guess = (within + beyond) // 2 if slow == 2 else _interpolated(costs, within, beyond, budget)
        at = min(max(guess, within + 1), beyond - 1)
        costs[at] = cost(at)
        if costs[at] <= budget:
            within = at
        else:
            beyond = at
        slow += 1
        if 2 * (beyond - within) <= width or slow == 3:
            slow, width = 0, beyond - within
    return within


def _interpolated(costs: Mapping[int, float], within: int, beyond: int, budget: float) -> int:
    """Guess where a power law through the enclosing points meets the budget; the middle where there is none."""
    known = [(at, costs[at]) for at in (within, beyond) if 0 < costs.get(at, 0.0) < math.inf]
    if not known or budget <= 0:
        return (within + beyond) // 2
    power = POWER
    if len(known) == 2:
        power = math.log(known[1][1] / known[0][1]) / math.log(beyond / within)
    at, found = known[-1]
    return round(at * (budget / found) ** (1 / power))
