"""The fused kernel, run by Triton's interpreter on the CPU, against the torch loop.

TRITON_INTERPRET=1 python -m pytest tests/solvers/test_triton_obs.py
"""

import os

import pytest
import torch

from wanda_lightning.solvers import factorize, obs, triton_obs
from wanda_lightning.sparsity import SemiStructured

interpreted = pytest.mark.skipif(
    triton_obs.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton, and TRITON_INTERPRET=1 before it is imported",
)


def block(columns: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(4 * columns, columns, generator=generator)
    inverse = obs._invert(factorize(x.t() @ x).lower_II)
    return torch.randn(columns, rows, generator=generator), inverse


@interpreted
@pytest.mark.parametrize(("columns", "rows"), [(16, 16), (48, 20), (1, 3)])
def test_given_weights(columns, rows):
    w, inverse = block(columns, rows)
    pruned = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = w.clone()
    obs._remove(expected, inverse, pruned)
    triton_obs.sweep(w, inverse, pruned)
    torch.testing.assert_close(w, expected, rtol=1e-5, atol=1e-5)
    assert not w[pruned].any()


@interpreted
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m(n, m):
    w, inverse = block(48, 20)
    w[:16] = w[:16].round()  # ties
    importance = torch.ones(48, 1)
    expected, pruned = w.clone(), torch.zeros(48, 20, dtype=torch.bool)
    expected_pruned = obs._remove_n_of_m(expected, inverse, importance, SemiStructured(n, m))
    triton_obs.sweep(w, inverse, pruned, importance, n, m)
    assert torch.equal(pruned, expected_pruned)
    torch.testing.assert_close(w, expected, rtol=1e-5, atol=1e-5)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(triton_obs, "triton", None)
    with pytest.raises(ImportError, match="not installed"):
        triton_obs.sweep(*block(4, 4), torch.zeros(4, 4, dtype=torch.bool))
