"""Which methods keep the zeros of an earlier pruning when they prune more."""

import pytest
import torch

from wanda_lightning import ADMM, RIA, Ablate, Gradual, InputHessian, Magnitude, SparseGPT, Unstructured, Wanda

METHODS = [
    Magnitude(),
    Magnitude(refine=3),
    Wanda(),
    Wanda(refine=3),
    Wanda(variant=True),
    RIA(),
    SparseGPT(block_size=8),
    SparseGPT(block_size=8, refine=3),
    ADMM(rho=0.1, refine=0),
    *(
        Ablate(selection, schedule, 8)
        for selection in ("wanda", "magnitude")
        for schedule in ("sequential", "iterative")
    ),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_a_method_says_is_so(method):
    """Zeros that are said to stay do, in many trials; solvers that move weights before they choose bring some back."""
    came_back = 0
    for seed in range(20):
        torch.manual_seed(seed)
        weight_OI, x_TI = torch.randn(8, 32), torch.randn(64, 32) @ torch.randn(32, 32)
        weight_OI[torch.rand(8, 32) < 0.3] = 0
        zero_OI = weight_OI == 0
        statistic = None if method.statistic is None else InputHessian(32)
        if statistic is not None:
            statistic.update(x_TI)
            statistic = statistic if issubclass(method.statistic, InputHessian) else statistic.norm()
        method.prune(weight_OI, statistic, Unstructured(0.5))
        came_back += int((weight_OI[zero_OI] != 0).sum())
    if method.zeros_stay:
        assert came_back == 0
    else:
        assert came_back > 0


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_gradual_schedule_takes_those_that_keep_zeros(method):
    schedule = Gradual(start=0, end=10)
    if method.zeros_stay:
        schedule.check(method, Unstructured(0.5), None)
    else:
        with pytest.raises(ValueError, match="weights that were pruned may come back"):
            schedule.check(method, Unstructured(0.5), None)
    Gradual(start=0, end=10, regrow=True).check(method, Unstructured(0.5), None)
