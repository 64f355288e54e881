"""Kept weights against a direct solution of each row's normal equations in float64."""

import pytest
import torch
from least_squares import error, hessian_of, normal_equations, random
from torch import Tensor

from wanda_lightning.solvers import factorize, fit_kept_weights, prune_with_admm, prune_with_mask
from wanda_lightning.solvers.conjugate_gradients import dead_inputs
from wanda_lightning.sparsity import SemiStructured


def mixed_mask(rows: int, features: int) -> Tensor:
    """Random rows, one fully kept, one fully pruned, and two with a single kept weight."""
    mask = random(rows, features, seed=5) > 0
    mask[0], mask[1], mask[2], mask[3] = True, False, False, False
    mask[2, 7] = mask[3, 3] = True
    return mask


@pytest.mark.parametrize("dead", [(), (0, 3, 20)])
@pytest.mark.parametrize("start", ["masked", "zeros", "surgeon"])
def test_equals_the_normal_equations(dead, start):
    dense, hessian, mask = random(10, 24), hessian_of(24, 200, dead), mixed_mask(10, 24)
    weight = {"masked": dense * mask, "zeros": torch.zeros(10, 24).double(), "surgeon": dense.clone()}[start]
    if start == "surgeon":
        prune_with_mask(weight, factorize(hessian), mask)
    expected = normal_equations(weight, dense, mask, hessian)
    fit_kept_weights(weight, dense, mask, hessian, steps=60, tolerance=1e-10)
    torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-8)
    assert not weight[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-12])
def test_weights_of_inputs_that_are_nearly_dead_do_not_make_up_for_others(dtype, size):
    """They would have to grow as the inputs shrink; of N:M patterns some of them stay, whatever the scores."""
    shrunk = torch.ones(24).double().index_fill_(0, torch.arange(4), size)
    hessian, dense = (hessian_of(24, 20) * shrunk * shrunk[:, None]).float(), random(10, 24).to(dtype)
    for solve in (refined, prune_with_admm):
        weight = dense.clone()
        mask = solve(weight, hessian, SemiStructured(2, 4))
        assert torch.equal(weight[:, :4], (dense * mask)[:, :4])
        assert not torch.equal(weight, dense * mask)


def refined(weight: Tensor, hessian: Tensor, pattern: SemiStructured) -> Tensor:
    dense, mask = weight.clone(), pattern.mask(weight.abs())
    weight.mul_(mask)
    fit_kept_weights(weight, dense, mask, hessian, steps=20)
    return mask


def test_float32():
    dense, hessian, mask = random(10, 24), hessian_of(24, 200), mixed_mask(10, 24)
    expected = normal_equations(dense * mask, dense, mask, hessian)
    weight = (dense * mask).float()
    fit_kept_weights(weight, dense.float(), mask, hessian.float(), steps=60)
    assert (weight - expected).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_every_row_goes_on_by_itself(steps):
    dense, hessian, mask = random(10, 24), hessian_of(24, 200), mixed_mask(10, 24)
    together = dense * mask
    fit_kept_weights(together, dense, mask, hessian, steps)
    for row in range(10):
        alone = (dense * mask)[row : row + 1]
        fit_kept_weights(alone, dense[row : row + 1], mask[row : row + 1], hessian, steps)
        torch.testing.assert_close(alone[0], together[row])


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("tokens", [8, 24, 200])  # with fewer tokens than features the Hessian is singular
def test_errors_never_rise_and_fall_with_more_steps(steps, tokens):
    dense, hessian, mask = random(10, 24), hessian_of(24, tokens), mixed_mask(10, 24)
    weight, further = (dense * mask).float(), (dense * mask).float()
    fit_kept_weights(weight, dense.float(), mask, hessian.float(), steps)
    fit_kept_weights(further, dense.float(), mask, hessian.float(), 2 * steps)
    rounded = dense.float().double()
    before, after = error(rounded * mask, rounded, hessian), error(weight.double(), rounded, hessian)
    assert (after <= before * (1 + 1e-6)).all()
    assert (after[4:] < before[4:]).all()
    assert error(further.double(), rounded, hessian).sum() <= after.sum() * (1 + 1e-6)
    assert weight.isfinite().all()


@pytest.mark.parametrize("steps", [60, 300, 1000])
def test_a_solved_row_waits_for_the_others(steps):
    """Some 64 kept weights fit 40 tokens exactly; more steps, along what rounding leaves, would lead far away."""
    dense, hessian, mask = random(64, 128).float(), hessian_of(128, 40), random(64, 128, seed=5) > 0
    weight = dense * mask
    fit_kept_weights(weight, dense, mask, hessian.float(), steps)
    before, after = (error(each.double(), dense.double(), hessian) for each in (dense * mask, weight))
    assert (after < 1e-6 * before).all()


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.01])
def test_a_row_ends_with_the_first_step_that_is_enough(tolerance):
    dense, hessian, mask = 7 * random(1, 24), hessian_of(24, 200), random(1, 24, seed=5) > 0
    norm = hessian.diagonal().sqrt()
    for steps in range(24):  # of which so many are enough, as float64 has them
        weight = dense * mask
        fit_kept_weights(weight, dense, mask, hessian, steps, tolerance=0)
        gradient = ((dense - weight) @ hessian * mask / norm).norm()
        if gradient <= tolerance * (dense * norm).norm():
            break
    ours = dense * mask
    fit_kept_weights(ours, dense, mask, hessian, 100, tolerance)
    assert 0 < steps < 23
    assert torch.equal(ours, weight)


def test_rows_at_their_optimum_do_not_move():
    dense, hessian, mask = random(10, 24), hessian_of(24, 200), mixed_mask(10, 24)
    weight = normal_equations(dense * mask, dense, mask, hessian).float()
    for steps in (1, 50):
        refined = weight.clone()
        fit_kept_weights(refined, dense.float(), mask, hessian.float(), steps)
        assert torch.equal(refined[:2], weight[:2])  # what is kept whole, or not at all, is exact
        assert (refined - weight).abs().max() < 1e-4
        assert (error(refined, dense, hessian) <= error(weight, dense, hessian) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    dense, hessian, mask = random(10, 24).to(dtype), hessian_of(24, 200), mixed_mask(10, 24)
    stored = (dense * mask).t().contiguous()
    expected = normal_equations((dense * mask).double(), dense.double(), mask, hessian)
    fit_kept_weights(stored.t(), dense, mask, hessian.float(), steps=60)
    before, best, after = (
        error(weight.double(), dense.double(), hessian) for weight in (dense * mask, expected, stored.t())
    )
    assert (after <= before).all()
    assert (after.sum() - best.sum()) < 0.01 * (before.sum() - best.sum())
    assert not stored.t()[~mask].any()


def test_a_row_that_rounding_makes_worse_goes_back():
    """Both 1.003 round down to 1, in a row whose inputs are alike; up and down would cancel out, as at the start."""
    dense = torch.tensor([[1.003, 1.003], [1.5, 2.0]])
    weight = torch.tensor([[1.0078125, 1.0], [1.0, 1.0]], dtype=torch.bfloat16)
    hessian = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    fit_kept_weights(weight, dense, torch.ones(2, 2, dtype=torch.bool), hessian, steps=5)
    assert weight.tolist() == [[1.0078125, 1.0], [1.5, 2.0]]


def test_dead_inputs_keep_what_they_had():
    dense, hessian = random(4, 8), hessian_of(8, 50, dead=(2, 5))
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[:, [0, 1, 5]] = False
    weight = dense * mask
    fit_kept_weights(weight, dense, mask, hessian, steps=20)
    assert torch.equal(weight[:, 2], dense[:, 2])
    assert not weight[:, 5].any()


@pytest.mark.parametrize("steps", [1, 10**9])
def test_a_diagonal_hessian_is_solved_in_one_step_however_many_are_allowed(steps):
    dense, mask = random(6, 12), random(6, 12, seed=3) > 0
    dense[2] = 0
    weight = torch.zeros(6, 12).double()
    fit_kept_weights(weight, dense, mask, torch.diag(torch.logspace(0, 4, 12)).double(), steps)
    torch.testing.assert_close(weight, dense * mask)


def test_dead_inputs_are_those_that_single_precision_loses():
    limit = torch.finfo(torch.float32).eps * 100 / 4
    diagonal = torch.tensor([0, 0.9 * limit, 1.1 * limit, 100]).double()
    assert dead_inputs(diagonal).tolist() == [True, True, False, False]
    assert dead_inputs(torch.zeros(3)).all()


def test_autocast_changes_nothing():
    dense, hessian, mask = random(10, 24).float(), hessian_of(24, 200).float(), mixed_mask(10, 24)
    plain, autocast = dense * mask, dense * mask
    fit_kept_weights(plain, dense, mask, hessian, steps=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit_kept_weights(autocast, dense, mask, hessian, steps=10)
    assert torch.equal(plain, autocast)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_agrees_with_cpu():
    dense, hessian, mask = random(70, 300).float(), hessian_of(300, 900).float(), mixed_mask(70, 300)
    on_cpu, on_gpu = dense * mask, (dense * mask).cuda()
    fit_kept_weights(on_cpu, dense, mask, hessian, steps=20)
    fit_kept_weights(on_gpu, dense.cuda(), mask.cuda(), hessian.cuda(), steps=20)
    assert (on_gpu.cpu() - on_cpu).norm() < 1e-3 * on_cpu.norm()
