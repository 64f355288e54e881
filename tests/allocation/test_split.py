"""The split of a total, against every choice that there is."""

import itertools
import math
import random

import pytest

from wanda_lightning.allocation.split import cheapest_split


def by_brute_force(costs, gains, total, over):
    """The least cost of all choices that reach the total."""
    least = math.inf
    for choice in itertools.product(*(range(len(options)) for options in costs)):
        gained = sum(gain[option] for gain, option in zip(gains, choice, strict=True))
        if gained == total or (over and gained > total):
            least = min(least, sum(cost[option] for cost, option in zip(costs, choice, strict=True)))
    return least


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_as_good_as_the_best_of_all_choices(seed, over):
    """With curves of any shape, also such that a greedy choice fails on; parts of several sizes."""
    rng = random.Random(seed)
    parts, options = rng.randint(1, 5), rng.randint(2, 5)
    costs = [[rng.choice([rng.random() * 9, math.inf, 3.0]) for _ in range(options)] for _ in range(parts)]
    gains = [[rng.randint(1, 4) * 12 * option for option in range(options)] for _ in range(parts)]
    total = sum(rng.choice(each) for each in gains)
    least = by_brute_force(costs, gains, total, over)
    if least == math.inf:
        with pytest.raises(ValueError, match=f"no choice reaches a total of {total}"):
            cheapest_split(costs, gains, total, over)
        return
    picked = cheapest_split(costs, gains, total, over)
    gained = sum(gain[option] for gain, option in zip(gains, picked, strict=True))
    assert gained == total or (over and gained > total)
    assert sum(cost[option] for cost, option in zip(costs, picked, strict=True)) == pytest.approx(least)


def test_sizes_without_a_common_divisor_are_rounded():
    """Far more weights than the table has units: the total is met to that precision."""
    rng = random.Random(0)
    sizes = [rng.randrange(10**7, 10**8) * 2 + 1 for _ in range(40)]
    gains = [[size * place for place in range(5)] for size in sizes]
    costs = [[place**2 * rng.random() for place in range(5)] for _ in sizes]
    total = 2 * sum(sizes)
    picked = cheapest_split(costs, gains, total)
    assert sum(gain[option] for gain, option in zip(gains, picked, strict=True)) == pytest.approx(total, rel=1e-3)


def test_what_may_be_more_is_never_less():
    rng = random.Random(0)
    sizes = [rng.randrange(10**7, 10**8) * 2 + 1 for _ in range(40)]
    gains = [[size * place for place in range(5)] for size in sizes]
    for total in range(2 * sum(sizes), 2 * sum(sizes) + 100):
        costs = [[place * rng.random() for place in range(5)] for _ in sizes]
        picked = cheapest_split(costs, gains, total, over=True)
        assert sum(gain[option] for gain, option in zip(gains, picked, strict=True)) >= total


def test_what_cannot_be_reached_is_refused():
    with pytest.raises(ValueError, match="no choice reaches a total of 5: the most that there is to gain is 4"):
        cheapest_split([[0, 1], [0, 1]], [[0, 2], [0, 2]], 5, over=True)


@pytest.mark.parametrize("over", [False, True])
def test_where_nothing_is_to_be_gained_the_cheapest_options_are_chosen(over):
    assert cheapest_split([[3, 1], [2, 5]], [[0, 0], [0, 0]], 0, over) == [1, 0]
