"""ADMM against the normal equations, against Wanda where inputs are uncorrelated, and against what came before it."""

import pytest
import torch
from least_squares import error, hessian_of, normal_equations, random

from wanda_lightning.methods import Wanda
from wanda_lightning.solvers import admm, factorize, prune_with_admm, prune_with_scores
from wanda_lightning.sparsity import SemiStructured, Unstructured
from wanda_lightning.statistics import InputNorm

PATTERNS = [Unstructured(0.37), Unstructured(0.5), Unstructured(0.7), SemiStructured(2, 4), SemiStructured(1, 4)]


def shrunk(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """What ADMM minimises: all but the diagonal counts less."""
    return torch.where(torch.eye(len(hessian)).bool(), hessian, hessian / (1 + damping))


@pytest.mark.parametrize("rho", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("dead", [(), (1, 2, 3, 9)])
def test_a_fixed_mask_leads_to_the_normal_equations(monkeypatch, rho, dead):
    dense, hessian, given = random(10, 24), hessian_of(24, 200, dead), random(10, 24, seed=5) > 0
    monkeypatch.setattr(admm, "_growing_mask", lambda *_: given)
    weight = dense.clone()
    mask = prune_with_admm(weight, hessian, Unstructured(0.5), 4000, rho, damping=0.01)
    assert torch.equal(mask, given)
    expected = normal_equations(dense * given, dense, given, shrunk(hessian, 0.01))
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_steps_are_those_of_the_textbook_with_a_multiplier_that_outlives_rho(monkeypatch):
    """Y = rho U is the gradient that holds weights at zero: it goes on as it was when rho rises."""
    dense, hessian, mask = random(10, 24), hessian_of(24, 200), random(10, 24, seed=5) > 0
    monkeypatch.setattr(admm, "_growing_mask", lambda *_: mask)
    weight = dense.clone()
    prune_with_admm(weight, hessian, Unstructured(0.5), 16, rho=1.0, damping=0.01)
    norm, one = hessian.diagonal().sqrt(), torch.eye(24, dtype=torch.float64)
    c = (hessian / norm / norm[:, None] / 1.01).fill_diagonal_(1)
    target, v, y = dense * norm @ c, dense * norm, torch.zeros_like(dense)
    for step in range(16):
        rho = admm.RISE ** (step // 2 / 7 - 1)  # eight stages of two steps
        z = mask * (v + y / rho)
        y = y + rho * (v - z)
        v = (target + rho * z - y) @ torch.linalg.inv(c + rho * one)
    torch.testing.assert_close(weight, mask * (v + y / rho) / norm)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_with_a_diagonal_hessian_the_masks_are_wandas_and_no_weight_changes(pattern):
    """Row by row, for Wanda compares within rows; a whole matrix is one long row of the same scores."""
    norm = InputNorm(64)
    norm.update(torch.diag(torch.linspace(0.1, 5, 64)))
    # Scores a fifth apart: the search may exchange two that are nearly equal.
    order = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in range(20)])
    dense = random(20, 64).float().sign() * 1.2 ** (order - 32) / norm.compute()
    expected = Wanda().prune(dense.clone(), norm, pattern)
    for row in range(20):
        weight = dense[row : row + 1].clone()
        mask = prune_with_admm(weight, torch.diag(norm.total), pattern)
        assert torch.equal(mask[0], expected[row])
        torch.testing.assert_close(weight, dense[row : row + 1] * mask, rtol=0.1, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_pattern_also_with_dead_inputs_in_transposed_weights(pattern, dtype):
    dead = (0, 1, 2, 9)
    stored = random(48, 10).to(dtype)
    mask = prune_with_admm(stored.t(), hessian_of(48, 200, dead).float(), pattern)
    assert torch.equal(stored.t() != 0, mask)
    assert stored.isfinite().all()
    pattern.check_mask(mask, 1 / 480)
    if isinstance(pattern, Unstructured):
        assert int((~mask).sum()) == int(480 * pattern.sparsity)
        assert not mask[:, dead].any()  # they went first


def test_kept_weights_of_dead_inputs_stay():
    dense = random(5, 8)
    weight = dense.clone()
    mask = prune_with_admm(weight, hessian_of(8, 50, (0, 1, 2, 3)), SemiStructured(1, 4))
    assert torch.equal(weight[:, :4], (dense * mask)[:, :4])
    assert mask[:, :4].sum(1).tolist() == [1] * 5


def test_beside_one_input_that_is_far_larger_the_others_go_by_their_scores():
    x, dense = random(100, 16), random(5, 16)
    x[:, 3] *= 1e6
    weight = dense.clone()
    mask = prune_with_admm(weight, (x.t() @ x).float(), Unstructured(0.5))
    score = dense.abs() * x.norm(dim=0)
    assert torch.equal(mask, Unstructured(0.5).mask(score.view(1, -1)).view_as(score))
    torch.testing.assert_close(weight, dense * mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), SemiStructured(2, 4)], ids=str)
def test_loses_less_than_sparsegpt(pattern, seed):
    dense, hessian = random(32, 64, seed=seed), hessian_of(64, 400)
    surgeon, together, factor = dense.clone(), dense.clone(), factorize(hessian)
    prune_with_scores(surgeon, factor, factor.lower_II.diagonal(), pattern, 16)
    prune_with_admm(together, hessian, pattern)
    assert error(together, dense, hessian).sum() < 0.9 * error(surgeon, dense, hessian).sum()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_mask_grows_by_the_cubic_schedule(pattern):
    score = random(12, 64).abs()
    final = pattern.mask(score.view(1, -1)).view_as(score)
    for progress in (0.0, 0.25, 0.5, 1.0):
        mask = admm._growing_mask(score, pattern, progress)
        assert mask[final].all()  # nothing goes that would stay at the end
        expected = pattern.sparsity * (1 - (1 - progress) ** 3)
        assert (~mask).double().mean() == pytest.approx(expected, abs=1 / score.numel())


def test_the_mask_grows_with_every_step(monkeypatch):
    reached, growing = [], admm._growing_mask
    monkeypatch.setattr(admm, "_growing_mask", lambda *args: reached.append(args[2]) or growing(*args))
    prune_with_admm(random(10, 24), hessian_of(24, 200), Unstructured(0.5), steps=5)
    assert reached == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_sparsity_zero_changes_little():
    dense = random(6, 16)
    weight = dense.clone()
    assert prune_with_admm(weight, hessian_of(16, 60), Unstructured(0.0)).all()
    torch.testing.assert_close(weight, dense)


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        prune_with_admm(random(4, 8), torch.full((8, 8), torch.nan).double(), Unstructured(0.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)], ids=str)
def test_gpu_agrees_with_cpu(pattern):
    dense, hessian = random(70, 300).float(), hessian_of(300, 900).float()
    on_cpu, on_gpu = dense.clone(), dense.cuda()
    mask = prune_with_admm(on_cpu, hessian, pattern)
    assert (prune_with_admm(on_gpu, hessian.cuda(), pattern).cpu() == mask).float().mean() > 0.99


@pytest.mark.parametrize(("steps", "stages"), [(1, 1), (2, 2), (7, 7), (8, 8), (40, 8)])
def test_rho_rises_to_its_value_however_few_the_steps(monkeypatch, steps, stages):
    rhos, inverse = [], admm._inverse
    monkeypatch.setattr(admm, "_inverse", lambda matrix, rho: rhos.append(rho) or inverse(matrix, rho))
    prune_with_admm(random(10, 24), hessian_of(24, 200), Unstructured(0.5), steps, rho=0.5)
    assert rhos == pytest.approx([0.5 * admm.RISE ** (-n / 7) for n in reversed(range(stages))])
