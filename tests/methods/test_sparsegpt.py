import pytest
import torch

from wanda_lightning.methods import SparseGPT
from wanda_lightning.solvers import prune_with_mask
from wanda_lightning.sparsity import SemiStructured, Unstructured, parse_pattern, sparsity_of
from wanda_lightning.statistics import InputHessian

CASES = ["case0", "case1", "case2", "case3"]  # case2 has dead inputs, case3 is a Conv1D


def hessian_of(x: torch.Tensor) -> InputHessian:
    hessian = InputHessian(x.shape[-1])
    hessian.update(x)
    return hessian


def read(pattern: str):
    return parse_pattern(pattern) if ":" in pattern else Unstructured(float(pattern))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4", "4:8"])
@pytest.mark.parametrize("block_size", [32, 128])
def test_golden_vectors_of_the_reference(golden, case, pattern, block_size):
    expected = golden[f"{case}.sparsegpt.weight.{pattern}.block{block_size}"]
    hessian, method = hessian_of(golden[f"{case}.inputs"]), SparseGPT(block_size)
    live = ~hessian.factor().dead_I  # the reference zeroes all weights of dead inputs, we only those we prune
    weight = golden[f"{case}.weight"].clone()
    mask = method.prune(weight, hessian, read(pattern))
    agreement = (mask == (expected != 0))[:, live].double().mean()
    assert agreement == 1 if ":" in pattern else agreement >= 0.99
    if agreement == 1:
        assert (weight - expected)[:, live].norm() < 1e-4 * expected.norm()
    given = golden[f"{case}.weight"].clone()
    prune_with_mask(given, hessian.factor(), expected != 0, block_size)
    assert (given - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("pattern", [Unstructured(0.37), SemiStructured(2, 4)])
def test_sparsity_is_exact_even_with_dead_inputs(pattern):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 48, generator=generator), torch.randn(10, 48, generator=generator)
    x[:, [0, 1, 2, 20]] = 0
    method = SparseGPT(block_size=20)
    mask = method.prune(weight, hessian_of(x), pattern)
    pattern.check_mask(mask, method.tolerance((10, 48)))
    assert weight.isfinite().all()
    assert torch.equal(weight != 0, mask)
    if isinstance(pattern, Unstructured):
        assert not mask[:, [0, 1, 2, 20]].any()  # they went first
        assert int((~mask).sum()) == int(200 * 0.37) * 2 + int(80 * 0.37)
    else:
        assert not (mask[:, :3].sum(1) > 1).any()  # of three dead inputs and a live one, the live one stays
        assert mask[:, 3].all()


def test_all_inputs_dead():
    weight = torch.ones(4, 8)
    mask = SparseGPT().prune(weight, hessian_of(torch.zeros(20, 8)), Unstructured(0.5))
    assert sparsity_of(mask) == 0.5
    assert weight.isfinite().all()


def test_tolerance_covers_what_blocks_round_down():
    method, shape, pattern = SparseGPT(block_size=3), (3, 10), Unstructured(0.5)
    x, weight = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)), torch.arange(1.0, 31).view(3, 10)
    mask = method.prune(weight, hessian_of(x), pattern)
    assert int((~mask).sum()) == 3 * (9 // 2) + 3 // 2  # not 15
    assert method.tolerance(shape) == 4 / 30
    pattern.check_mask(mask, method.tolerance(shape))


def test_linears_share_one_factorisation(monkeypatch):
    from wanda_lightning import statistics

    calls, factorize = [], statistics.factorize
    monkeypatch.setattr(statistics, "factorize", lambda *args: calls.append(1) or factorize(*args))
    hessian = hessian_of(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)))
    for rows in (4, 8, 4):
        SparseGPT().prune(torch.ones(rows, 16), hessian, SemiStructured(2, 4))
    assert len(calls) == 1


def test_does_not_depend_on_how_batches_were_split():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 32, generator=generator), torch.randn(12, 32, generator=generator)
    split = InputHessian(32)
    for batch in x.split((1, 99, 200)):
        split.update(batch)
    whole, parts = weight.clone(), weight.clone()
    SparseGPT().prune(whole, hessian_of(x), Unstructured(0.5))
    SparseGPT().prune(parts, split, Unstructured(0.5))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 32, generator=generator), torch.randn(12, 32, generator=generator)
    plain, autocast = weight.clone(), weight.clone()
    SparseGPT(block_size=8).prune(plain, hessian_of(x), Unstructured(0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hessian = hessian_of(x)
        SparseGPT(block_size=8).prune(autocast, hessian, Unstructured(0.5))
        energy = hessian.output_energy(weight)
    assert torch.equal(autocast, plain)
    assert torch.equal(energy, hessian_of(x).output_energy(weight))


@pytest.mark.parametrize("block_size", [0, -1, 2.5, True, "128"])
def test_bad_block_size(block_size):
    with pytest.raises(ValueError, match=f"block_size must be a whole number of at least 1, got {block_size!r}"):
        SparseGPT(block_size=block_size)


@pytest.mark.parametrize("damping", [0, -0.01, float("nan"), float("inf"), True, "0.01"])
def test_bad_damping(damping):
    with pytest.raises(ValueError, match="damping must be a finite number above 0"):
        SparseGPT(damping=damping)


def test_blocks_must_hold_whole_groups():
    SparseGPT(block_size=12).check(SemiStructured(2, 4))
    SparseGPT(block_size=30).check(Unstructured(0.5))
    with pytest.raises(ValueError, match=r"block_size must be a multiple of 4 for pattern 2:4, got 30"):
        SparseGPT(block_size=30).check(SemiStructured(2, 4))


def test_shrinkage_leaves_less_of_the_correlations():
    """The same as SparseGPT on inputs of which each has as much energy more, unrelated to the others'."""
    x, weight = torch.randn(60, 16).double(), torch.randn(6, 16).double()
    more = 0.3**0.5 * x.norm(dim=0).diag()
    weights = weight.clone(), weight.clone()
    masks = [
        method.prune(each, hessian_of(tokens), SemiStructured(2, 4))
        for method, each, tokens in (
            (SparseGPT(shrinkage=0.3, damping=1e-9), weights[0], x),
            (SparseGPT(damping=1e-9), weights[1], torch.cat([x, more])),
        )
    ]
    assert torch.equal(*masks)
    torch.testing.assert_close(*weights)
    with pytest.raises(ValueError, match="shrinkage must be a finite number of at least 0, got -1"):
        SparseGPT(shrinkage=-1)
