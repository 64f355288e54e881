"""Under autocast, in which Trainers prune, all sums and solvers give the bits that they give without."""

import pytest
import torch
from least_squares import hessian_of, random
from torch import Tensor

from wanda_lightning.calibration.input_drift import InputDrift
from wanda_lightning.precision import full_float32
from wanda_lightning.solvers import factorize, prune_with_admm, prune_with_mask
from wanda_lightning.solvers.neurons import fit_to_all_inputs, remove_inputs
from wanda_lightning.sparsity import Unstructured
from wanda_lightning.statistics import InputNorm

X, HESSIAN, WEIGHT = random(200, 24).float(), hessian_of(24, 200).float(), random(10, 24).float()
KEPT = torch.arange(24) % 3 > 0


def energy_of_norms() -> Tensor:
    norm = InputNorm(24)
    norm.update(X)
    return norm.output_energy(WEIGHT)


def solution() -> Tensor:
    return factorize(HESSIAN).solve(HESSIAN[:, :5])


def surgeon() -> Tensor:
    weight = WEIGHT.clone()
    prune_with_mask(weight, factorize(HESSIAN), KEPT.expand(10, 24), 8)
    return weight


def together() -> Tensor:
    weight = WEIGHT.clone()
    prune_with_admm(weight, HESSIAN, Unstructured(0.5), steps=4)
    return weight


def without_inputs() -> Tensor:
    return remove_inputs(WEIGHT, factorize(HESSIAN), 9)


def refitted() -> Tensor:
    return fit_to_all_inputs(WEIGHT, KEPT, HESSIAN)


def aimed_at_dense() -> Tensor:
    drift = InputDrift(24)
    for batch, is_held_out in enumerate((False, True)):
        some = X[100 * batch : 100 * batch + 100]
        drift.update_with_dense(some, 0.1 / (1 + is_held_out) * some.roll(1, 1), None, is_held_out)
    target = drift.target("q", WEIGHT)
    assert target is not None
    return target[0]


@pytest.mark.parametrize(
    "compute",
    [energy_of_norms, solution, surgeon, together, without_inputs, refitted, aimed_at_dense],
)
def test_autocast_changes_nothing(compute):
    plain = compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compute(), plain)


def test_an_error_leaves_what_the_user_allows():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ZeroDivisionError), full_float32(torch.device("cpu")):
            raise ZeroDivisionError
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
