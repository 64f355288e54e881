"""Group OBS against brute force over single inputs, and the refit against least squares, in float64."""

import pytest
import torch
from least_squares import random

from wanda_lightning.solvers import neurons
from wanda_lightning.solvers.factor import factorize
from wanda_lightning.solvers.neurons import cost_of_block, fit_to_all_inputs, remove_blocks, remove_inputs

TINY = 1e-12


def inputs(features: int, tokens: int = 300, dead: tuple[int, ...] = ()) -> torch.Tensor:
    x_TI = random(tokens, features, seed=1) @ random(features, features, seed=2)
    x_TI[:, list(dead)] = 0
    return x_TI


def best_without(weight, x, kept):
    """The least squared error that the outputs have with some inputs only."""
    fitted = torch.linalg.lstsq(x[:, kept], x @ weight.t()).solution
    return (x[:, kept] @ fitted - x @ weight.t()).square().sum().item()


def one_by_one(weight, x, number):
    """Remove the input without which a new least-squares fit of the dense outputs is best, several times."""
    kept = list(range(weight.shape[1]))
    for _ in range(number):
        kept.remove(min(kept, key=lambda j: best_without(weight, x, [k for k in kept if k != j])))
    return kept


def block_by_block(weight, x, number, block):
    """Remove the block of inputs without which a new least-squares fit is best, several times; tell what it cost."""
    left, error, costs = list(range(0, weight.shape[1], block)), 0.0, []
    for _ in range(number):
        errors = {
            start: best_without(weight, x, [k + j for k in left if k != start for j in range(block)]) for start in left
        }
        left.remove(best := min(errors, key=errors.__getitem__))
        costs.append(errors[best] - error)
        error = errors[best]
    return [start + j for start in left for j in range(block)], costs


@pytest.mark.parametrize(("features", "block", "number"), [(20, 4, 3), (24, 8, 2), (24, 3, 7), (12, 12, 0)])
def test_the_choice_of_blocks_is_that_of_brute_force(monkeypatch, features, block, number):
    x, weight, costs = inputs(features), random(7, features), []
    before = weight.clone()

    def cost(*args):
        costs.append(cost_of_block(*args))
        return costs[-1]

    monkeypatch.setattr(neurons, "cost_of_block", cost)
    mask = remove_blocks(weight, factorize(x.t() @ x, TINY), number, block)
    kept, expected = block_by_block(weight, x, number, block)
    assert mask.nonzero().flatten().tolist() == kept
    blocks, lowest = features // block, []
    for step in range(number):
        lowest.append(min(costs[: blocks - step]))
        del costs[: blocks - step]
    assert lowest == pytest.approx(expected, rel=1e-6)
    assert torch.equal(weight, before)


def test_blocks_of_one_are_single_inputs():
    x, weight = inputs(20, dead=(4, 7)), random(7, 20)
    factor = factorize(x.t() @ x, 0.01)
    assert torch.equal(remove_blocks(weight, factor, 9, 1), remove_inputs(weight, factor, 9))


@pytest.mark.parametrize("block", [1, 4, 32])
def test_the_choice_is_that_of_brute_force(monkeypatch, block):
    monkeypatch.setattr(neurons, "BLOCK", block)
    x, weight = inputs(20), random(7, 20)
    before = weight.clone()
    mask = remove_inputs(weight, factorize(x.t() @ x, TINY), 9)
    assert mask.nonzero().flatten().tolist() == one_by_one(weight, x, 9)
    assert torch.equal(weight, before)


def test_it_is_better_than_the_smallest_weights():
    x, weight = inputs(20), random(7, 20)
    mask = remove_inputs(weight, factorize(x.t() @ x, TINY), 9)
    smallest = weight.norm(dim=0).argsort()[9:]
    assert best_without(weight, x, mask) < 0.9 * best_without(weight, x, smallest)


def test_dead_inputs_go_first_whatever_their_weights():
    x, weight = 1e-3 * inputs(12, dead=(2, 7)), random(5, 12)  # small, so that even a weight of 1 would count
    weight[:, 7] = 100
    mask = remove_inputs(weight, factorize(x.t() @ x, 0.01), 2)
    assert (~mask).nonzero().flatten().tolist() == [2, 7]


def test_the_refit_is_least_squares():
    x, weight = inputs(20), random(7, 20)
    mask = torch.ones(20, dtype=torch.bool).index_fill_(0, torch.tensor([0, 3, 11, 19]), 0)
    found = fit_to_all_inputs(weight, mask, x.t() @ x, TINY)
    wanted = torch.linalg.lstsq(x[:, mask], x @ weight.t()).solution.t()
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


def test_damping_pulls_the_refit_to_the_weights_as_they_were():
    x, weight = inputs(20), random(7, 20)
    mask = torch.ones(20, dtype=torch.bool).index_fill_(0, torch.tensor([0, 3]), 0)
    hessian = x.t() @ x
    added = 0.3 * hessian.diagonal()[mask].mean()
    rows = [x[:, mask], added.sqrt() * torch.eye(18).double()]  # ridge regression as rows of a least-squares problem
    targets = [x @ weight.t(), added.sqrt() * weight[:, mask].t()]
    wanted = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.t()
    torch.testing.assert_close(fit_to_all_inputs(weight, mask, hessian, 0.3), wanted, rtol=1e-7, atol=1e-8)


def test_nothing_to_remove_changes_nothing():
    x, weight = inputs(6), random(3, 6)
    mask = remove_inputs(weight, factorize(x.t() @ x), 0)
    assert mask.all()
    assert torch.equal(fit_to_all_inputs(weight, mask, x.t() @ x), weight)
