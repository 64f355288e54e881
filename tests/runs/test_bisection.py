"""The search for where a curve leaves a budget, against looking at all of it."""

import math
import random

import pytest

from wanda_lightning.runs.bisection import last_within

SPECIAL = [0.0, 1e-9, 1.0, 10.0, math.inf]


def curves(seed: int, special: list[float]) -> list[tuple[list[float], float]]:
    """Random curves that begin with 0, of one to two hundred points, and a budget for each."""
    draw = random.Random(seed)

    def one() -> float:
        return draw.choice(special) if draw.random() < 0.3 else 10 * draw.random() ** draw.choice([1, 9])

    return [
        (
            [0.0, *(one() for _ in range(draw.choice([0, 1, 2, 3, 9, 99, 199])))],
            draw.choice([0.0, 20 * draw.random() ** 3]),
        )
        for _ in range(500)
    ]


def asked(costs: list[float], budget: float) -> tuple[int, list[int]]:
    """Return what is found on a curve, and which of its points were looked at."""
    seen = []
    found = last_within(lambda number: seen.append(number) or costs[number], budget, len(costs))
    assert len(seen) == len(set(seen)) <= 3 * math.ceil(math.log2(len(costs)))
    return found, seen


def test_monotone_curves():
    for steps, budget in curves(0, SPECIAL):
        costs = sorted(steps)
        found, _ = asked(costs, budget)
        assert found == max(number for number, cost in enumerate(costs) if cost <= budget)


def test_any_other_curve_leaves_the_budget_at_what_is_found():
    for costs, budget in curves(1, [*SPECIAL, -1.0, -math.inf, math.nan]):
        found, seen = asked(costs, budget)
        assert costs[found] <= budget
        assert found + 1 == len(costs) or not costs[found + 1] <= budget
        assert 0 not in seen
        assert {found, found + 1} - {0, len(costs)} <= {*seen}  # both sides were looked at


@pytest.mark.parametrize("power", [2, 3, 4, 6])
def test_it_asks_less_often_than_bisection(power):
    """Of a hundred sparsities, on curves that rise as perplexity does; bisection asks six or seven times."""
    curve = [8 * (number / 100) ** power for number in range(100)]
    counts = [len(asked(curve, math.log1p(budget))[1]) for budget in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)]
    assert sum(counts) / len(counts) <= (5.75 if power == 2 else 4.25)
    assert max(counts) <= 9
