"""``refine`` of every method that has it: the same mask, better weights, and nothing new where it is off."""

import pytest
import torch
from least_squares import error, hessian_of, normal_equations, random

from wanda_lightning.methods import ADMM, Ablate, Magnitude, PruningMethod, SparseGPT, Wanda
from wanda_lightning.sparsity import SemiStructured, Unstructured
from wanda_lightning.statistics import InputHessian, InputNorm, InputStatistic

METHODS = [Magnitude, Wanda, SparseGPT, Ablate, ADMM]
PATTERNS = [Unstructured(0.5), SemiStructured(2, 4)]


def layer() -> tuple[torch.Tensor, InputHessian]:
    hessian = InputHessian(24)
    hessian.total, hessian.tokens = hessian_of(24, 200, dead=(3,)).float(), 200
    return random(10, 24).float(), hessian


def given(method: PruningMethod, hessian: InputHessian) -> InputStatistic | None:
    """The statistic that a method asks for."""
    return {None: None, InputNorm: hessian.norm(), InputHessian: hessian}[method.statistic]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("cls", METHODS)
def test_the_mask_stays_and_its_weights_become_the_best(cls, pattern):
    dense, hessian = layer()
    plain, refined = dense.clone(), dense.clone()
    method = cls(refine=0)
    mask = method.prune(plain, given(method, hessian), pattern)
    assert torch.equal(cls(refine=60).prune(refined, hessian, pattern), mask)
    expected = normal_equations(plain.double(), dense.double(), mask, hessian.total.double())
    assert (refined - expected).abs().max() < 1e-4
    energies = [error(w.double(), dense.double(), hessian.total.double()) for w in (refined, plain)]
    assert energies[0].sum() < energies[1].sum()


@pytest.mark.parametrize("method", [Wanda(), Wanda(variant=True), Magnitude(), SparseGPT(), Ablate()], ids=str)
def test_off_by_default_and_unnamed(method):
    assert method.refine == 0
    assert "refine" not in str(method)


def test_named_where_it_is_on():
    assert str(Wanda(refine=20)) == "Wanda(variant=False, refine=20)"
    assert repr(SparseGPT(refine=5)) == "SparseGPT(block_size=128, damping=0.01, refine=5)"
    assert repr(Magnitude(refine=5)) == "Magnitude(refine=5)"


def test_methods_without_a_hessian_ask_for_one():
    assert (Wanda().statistic, Magnitude().statistic) == (InputNorm, None)
    assert (Wanda(refine=1).statistic, Magnitude(refine=1).statistic) == (InputHessian, InputHessian)


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("steps", [-1, 2.5, True, "20"])
def test_bad_steps(cls, steps):
    with pytest.raises(ValueError, match=f"refine must be a whole number of at least 0, got {steps!r}"):
        cls(refine=steps)
