"""The fused kernel, run by Triton's interpreter on the CPU, against the torch loop. See test_obs.py for GPUs."""

import os

import pytest
import torch

from wanda_lightning.solvers import factorize, obs, prune_with_scores, triton_obs
from wanda_lightning.sparsity import SemiStructured, Unstructured

interpreted = pytest.mark.skipif(
    triton_obs.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and no GPU",
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


@interpreted
@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)], ids=str)
def test_a_whole_weight_block_by_block(pattern, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 100, generator=generator), torch.randn(20, 100, generator=generator)
    factor = factorize(x.t() @ x)
    results = []
    for fused in (obs._fused, lambda *block: triton_obs.sweep(*block) or True):
        monkeypatch.setattr(obs, "_fused", fused)
        pruned = weight.clone()
        mask = prune_with_scores(pruned, factor, factor.lower_II.diagonal(), pattern, 32)  # the last block is narrower
        results.append((pruned, mask))
    assert torch.equal(results[1][1], results[0][1])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(triton_obs, "triton", None)
    with pytest.raises(ImportError, match="not installed"):
        triton_obs.sweep(*block(4, 4), torch.zeros(4, 4, dtype=torch.bool))
