"""The fused kernel, run by Triton's interpreter on the CPU, against brute force. See test_obs.py for GPUs."""

import logging
import os

import pytest
import torch
from brute_force import brute_force

from wanda_lightning.solvers import factorize, obs, prune_with_mask, prune_with_scores, triton_obs
from wanda_lightning.sparsity import SemiStructured, Unstructured

interpreted = pytest.mark.skipif(
    triton_obs.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and no GPU",
)


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the solver take the kernel on CPUs too; whether it works is asked anew."""
    monkeypatch.setattr(obs, "FUSED_DEVICES", ["cpu"])
    triton_obs.works.cache_clear()
    yield
    triton_obs.works.cache_clear()


@pytest.fixture
def launches(on_cpu, monkeypatch) -> list:
    """Columns of the blocks that the kernel was given; the first of a width is a try."""
    widths, sweep = [], triton_obs.sweep
    monkeypatch.setattr(triton_obs, "sweep", lambda w, *rest: widths.append(len(w)) or sweep(w, *rest))
    return widths


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(4 * columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.t() @ x


@interpreted
@pytest.mark.parametrize(("rows", "columns", "widths"), [(16, 16, [16]), (20, 48, [32, 16]), (3, 1, [1])])
def test_given_weights(rows, columns, widths, launches):
    weight, hessian = problem(rows, columns)
    removed = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    choose = lambda w, score, j: (0, columns, removed) if j == 0 else None  # noqa: E731
    expected, mask = brute_force(weight.double(), hessian.double(), choose)
    prune_with_mask(weight, factorize(hessian), mask, 32)  # the last block of 48 columns is narrower
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-4)
    assert not weight[removed].any()
    assert launches == [width for width in widths for _ in ("tried", "used")]


@interpreted
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m(n, m, launches):
    weight, hessian = problem(20, 48)
    weight[:, :16] = weight[:, :16].round()  # ties
    pattern = SemiStructured(n, m)
    choose = lambda w, score, j: None if j % m else (j, j + m, ~pattern.mask(w[:, j : j + m].abs()))  # noqa: E731
    expected, mask = brute_force(weight.double(), hessian.double(), choose)
    ours = prune_with_scores(weight, factorize(hessian), torch.ones(48), pattern, 48)
    assert torch.equal(ours, mask)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-4)
    assert launches == [48, 48]


@interpreted
@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)], ids=str)
def test_a_whole_weight_block_by_block(pattern, launches, monkeypatch):
    weight, hessian = problem(20, 100)
    factor, results = factorize(hessian), []
    for devices in ([], ["cpu"]):
        monkeypatch.setattr(obs, "FUSED_DEVICES", devices)
        assert not launches
        pruned = weight.clone()
        results.append((pruned, prune_with_scores(pruned, factor, factor.lower_II.diagonal(), pattern, 32)))
    assert launches == [32, 32, 32, 32, 4, 4]
    assert torch.equal(results[1][1], results[0][1])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("failure", [ImportError("Triton is not installed"), RuntimeError("no C compiler")])
def test_where_it_does_not_run_the_torch_loop_takes_over(failure, on_cpu, monkeypatch, caplog):
    def fail(*_):
        raise failure

    weight, hessian = problem(4, 8)
    expected, mask = weight.clone(), weight > 0
    monkeypatch.setattr(obs, "FUSED_DEVICES", [])
    prune_with_mask(expected, factorize(hessian), mask)
    monkeypatch.setattr(obs, "FUSED_DEVICES", ["cpu"])
    monkeypatch.setattr(triton_obs, "sweep", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pruned = weight.clone()
            prune_with_mask(pruned, factorize(hessian), mask)
            assert torch.equal(pruned, expected)
    assert [record.message for record in caplog.records] == [
        f"the fused GPU kernel cannot be used, the slower torch loop takes over: {failure}"
    ]


def test_other_failures_are_not_hidden(on_cpu, monkeypatch):
    def fail(*_):
        raise TypeError("a mistake of ours")

    weight, hessian = problem(4, 8)
    monkeypatch.setattr(triton_obs, "sweep", fail)
    with pytest.raises(TypeError, match="a mistake of ours"):
        prune_with_mask(weight, factorize(hessian), weight > 0)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(triton_obs, "triton", None)
    with pytest.raises(ImportError, match="not installed"):
        triton_obs.sweep(torch.ones(4, 4), torch.eye(4), torch.zeros(4, 4, dtype=torch.bool))
