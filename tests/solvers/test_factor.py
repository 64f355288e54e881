import logging
from unittest import mock

import pytest
import torch

from wanda_lightning.solvers import factorize


def random_hessian(features: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    x = torch.randn(2 * features + 5, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x.t() @ x).to(dtype)


@pytest.mark.parametrize("shrinkage", [0, 0.3])
@pytest.mark.parametrize("features", [1, 7, 192, 193, 400])
def test_explains_the_damped_hessian(features, shrinkage):
    hessian = random_hessian(features)
    factor = factorize(hessian, 0.01, shrinkage)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    damped += shrinkage * hessian.diagonal().diag()
    lower = factor.lower_II
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower.t() @ lower, damped, rtol=1e-11, atol=1e-9)
    assert factor.damping == 0.01


def test_is_the_factor_of_the_inverse_that_sparsegpt_uses():
    hessian = random_hessian(100)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(100, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    inverse = torch.linalg.inv(factorize(hessian, 0.01).lower_II)
    torch.testing.assert_close(inverse.t(), upper, rtol=1e-9, atol=1e-12)


def test_float32_is_near_float64():
    single, double = (
        factorize(random_hessian(300, dtype)).lower_II.double() for dtype in (torch.float32, torch.float64)
    )
    assert (single - double).norm() < 1e-5 * double.norm()


def test_reads_only_the_lower_triangle():
    hessian = random_hessian(250)
    assert torch.equal(factorize(hessian.tril()).lower_II, factorize(hessian).lower_II)


def test_leaves_the_hessian_alone():
    hessian = random_hessian(30)
    before = hessian.clone()
    factorize(hessian)
    assert torch.equal(hessian, before)


def test_dead_inputs_decouple():
    hessian = random_hessian(20)
    hessian[[3, 11]] = 0
    hessian[:, [3, 11]] = 0
    factor = factorize(hessian)
    assert factor.dead_I.nonzero().flatten().tolist() == [3, 11]
    assert factor.lower_II.isfinite().all()
    assert (factor.lower_II.diagonal() > 0).all()
    assert not factor.lower_II[11, :11].any()
    assert factorize(torch.zeros(5, 5)).lower_II.isfinite().all()


def test_damping_is_raised_until_the_factor_exists(caplog):
    hessian = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    with caplog.at_level(logging.WARNING):
        factor = factorize(hessian, 0.01)
    assert factor.damping == pytest.approx(0.1)
    assert "damping raised from 0.01 to 0.1" in caplog.text
    torch.testing.assert_close(factor.lower_II.t() @ factor.lower_II, hessian + 0.1 * torch.eye(2))


@pytest.mark.parametrize("first", [0, 2, 4])
def test_one_block_of_columns_is_enough_to_raise_it(monkeypatch, first):
    monkeypatch.setattr("wanda_lightning.solvers.factor.BLOCK", 2)
    hessian = torch.eye(6)
    hessian[first, first + 1] = hessian[first + 1, first] = 1.05
    assert factorize(hessian, 0.01).damping == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("damping", "tried"), [(0.001, [0.001, 0.01, 0.1, 1.0]), (0.05, [0.05, 0.5]), (0.11, [0.11]), (2.0, [2.0])]
)
def test_it_is_raised_tenfold_up_to_1(monkeypatch, damping, tried):
    added = []
    monkeypatch.setattr(
        "wanda_lightning.solvers.factor._reverse_cholesky", lambda _, added_I: added.append(float(added_I[0]))
    )
    with pytest.raises(torch.linalg.LinAlgError, match=f"damping up to {tried[-1]:g} "):
        factorize(torch.eye(2).double(), damping)
    assert added == pytest.approx(tried)


@pytest.mark.parametrize(
    "bad",
    [
        [[1.0, 3.0], [3.0, 1.0]],
        [[float("nan"), 0.0], [0.0, 1.0]],
        [[1.0, 0.0], [float("inf"), 1.0]],
        [[3.4e38]],  # too large once it is damped
    ],
)
def test_a_hopeless_hessian_is_an_error(bad):
    with pytest.raises(torch.linalg.LinAlgError, match=r"[12] inputs is not positive definite.*damping"):
        factorize(torch.tensor(bad))


def test_damping_of_zero_is_not_raised_for_ever(monkeypatch):
    monkeypatch.setattr("wanda_lightning.solvers.factor._reverse_cholesky", mock.Mock(side_effect=[None]))
    with pytest.raises(torch.linalg.LinAlgError, match=r"with damping up to 0 .*set a larger damping"):
        factorize(torch.ones(2, 2), damping=0.0)
