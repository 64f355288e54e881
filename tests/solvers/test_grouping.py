"""Which inputs stand together, against every way there is."""

import itertools

import pytest
import torch

from wanda_lightning.solvers.grouping import grouped
from wanda_lightning.sparsity import SemiStructured


def kept(score_OI, order, pattern):
    """The sum of scores that the pattern keeps, by its own mask."""
    in_order = score_OI[:, order]
    return float((in_order * pattern.mask(in_order)).sum())


def every_grouping(inputs, m):
    """All ways to part inputs into groups of m, as orders."""
    if not inputs:
        yield []
        return
    first, *others = inputs
    for with_first in itertools.combinations(others, m - 1):
        left = [each for each in others if each not in with_first]
        yield from ([first, *with_first, *rest] for rest in every_grouping(left, m))


@pytest.mark.parametrize("pattern", [SemiStructured(2, 4), SemiStructured(1, 4), SemiStructured(3, 4)], ids=str)
def test_close_to_the_best_of_all_orders(pattern):
    found, best, given = [], [], []
    for seed in range(6):
        torch.manual_seed(seed)
        score = torch.randn(6, 8).square() * torch.rand(8).square()
        order = grouped(score, pattern)
        assert sorted(order.tolist()) == [*range(8)]
        given.append(kept(score, torch.arange(8), pattern))
        found.append(kept(score, order, pattern))
        best.append(max(kept(score, torch.tensor(each), pattern) for each in every_grouping([*range(8)], 4)))
        assert given[-1] <= found[-1] <= best[-1] * (1 + 1e-6)
    assert sum(found) - sum(given) > 0.8 * (sum(best) - sum(given)) > 0


def test_what_was_mixed_up_is_found_again():
    """Two large inputs and two of zeros in each group lose nothing: there is such an order, and it is found."""
    torch.manual_seed(0)
    score = torch.rand(5, 64) + 1
    score[:, torch.randperm(64)[:32]] = 0
    assert kept(score, grouped(score, SemiStructured(2, 4)), SemiStructured(2, 4)) == pytest.approx(float(score.sum()))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2), (2, 16)])
def test_never_worse_than_the_order_given(n, m):
    torch.manual_seed(0)
    pattern, score = SemiStructured(n, m), torch.randn(20, 96).square() * torch.rand(96)
    order = grouped(score, pattern)
    assert sorted(order.tolist()) == [*range(96)]
    given = kept(score, torch.arange(96), pattern)
    assert kept(score, order, pattern) > given
    again = kept(score[:, order], grouped(score[:, order], pattern), pattern)
    assert again >= kept(score, order, pattern)


@pytest.mark.parametrize("pattern", [SemiStructured(2, 4), SemiStructured(4, 8), SemiStructured(1, 4)], ids=str)
def test_rounds_go_on_as_long_as_they_gain_a_hundredth(pattern):
    torch.manual_seed(4)  # where a single round leaves 1.5 to 5 hundredths of what was lost
    score = torch.randn(16, 64).square() * torch.rand(64).square()
    found = score[:, grouped(score, pattern)]
    lost, left, at_last = (
        float(each.sum()) - kept(each, order, pattern)
        for each, order in ((score, torch.arange(64)), (found, torch.arange(64)), (found, grouped(found, pattern)))
    )
    assert left - at_last < 0.01 * lost


@pytest.mark.parametrize("score", [torch.zeros(3, 16), torch.ones(3, 16)], ids=["nothing", "all alike"])
def test_where_nothing_can_be_gained_the_order_stays(score):
    assert grouped(score, SemiStructured(2, 4)).tolist() == [*range(16)]


def test_one_group_has_nothing_to_exchange():
    assert grouped(torch.rand(3, 4), SemiStructured(2, 4)).tolist() == [0, 1, 2, 3]


def test_sums_that_overflow_end_the_exchange():
    order = grouped(torch.full((4, 16), 1e300, dtype=torch.float64).square(), SemiStructured(2, 4))
    assert sorted(order.tolist()) == [*range(16)]


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_the_scale_of_the_scores_does_not_matter(scale):
    torch.manual_seed(0)
    score = torch.randn(8, 64).square() * torch.rand(64)
    assert torch.equal(grouped(score * scale, SemiStructured(2, 4)), grouped(score, SemiStructured(2, 4)))
