"""The column loop against one-at-a-time Optimal Brain Surgeon in float64, and its properties."""

import pytest
import torch
from brute_force import brute_force, damped
from torch import Tensor

from wanda_lightning.solvers import factorize, prune_with_mask, prune_with_scores, triton_obs
from wanda_lightning.sparsity import SemiStructured, Unstructured


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def correlated_hessian(features: int, seed: int = 1) -> Tensor:
    x = random(3 * features, features, seed=seed) @ (random(features, features, seed=seed + 1) + torch.eye(features))
    return x.t() @ x


@pytest.mark.parametrize("block_size", [1, 5, 16, 24, 128])
def test_given_mask_equals_brute_force(block_size):
    weight, hessian = random(6, 24), correlated_hessian(24)
    removed = random(6, 24, seed=9) < 0
    expected, mask = brute_force(weight, hessian, lambda w, score, j: (0, 24, removed) if j == 0 else None)
    factor = factorize(hessian)
    prune_with_mask(weight, factor, mask, block_size)
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(weight != 0, mask)
    single = random(6, 24).float()
    prune_with_mask(single, factorize(hessian.float()), mask, block_size)
    assert (single - expected).abs().max() < 1e-5


@pytest.mark.parametrize("block_size", [8, 12, 24])
def test_unstructured_choice_equals_brute_force(block_size):
    weight, hessian, pattern = random(5, 24), correlated_hessian(24), Unstructured(0.6)

    def choose(w, score, j):
        if j % block_size:
            return None
        near = score[:, j : j + block_size]
        return j, j + block_size, ~pattern.mask(near.reshape(1, -1)).view(near.shape)

    expected, mask = brute_force(weight, hessian, choose)
    factor = factorize(hessian)
    ours = prune_with_scores(weight, factor, factor.lower_II.diagonal(), pattern, block_size)
    assert torch.equal(ours, mask)
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (1, 3), (6, 24)])  # 24: more than a sub-block
def test_n_of_m_choice_equals_brute_force(n, m):
    weight, hessian, pattern = random(5, 24), correlated_hessian(24), SemiStructured(n, m)

    def choose(w, score, j):
        return None if j % m else (j, j + m, ~pattern.mask(score[:, j : j + m]))

    expected, mask = brute_force(weight, hessian, choose)
    factor = factorize(hessian)
    ours = prune_with_scores(weight, factor, factor.lower_II.diagonal(), pattern, 2 * m)
    assert torch.equal(ours, mask)
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)


def test_is_the_least_squares_optimum_when_every_kept_weight_comes_last():
    weight, hessian = random(8, 40), correlated_hessian(40)
    mask = torch.arange(40).expand(8, 40) >= torch.arange(3, 27, 3).unsqueeze(1)
    updated = weight.clone()
    prune_with_mask(updated, factorize(hessian), mask, 16)
    gradient = (updated - weight) @ damped(hessian)
    assert gradient[mask].abs().max() < 1e-8 * (weight @ damped(hessian)).abs().max()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)])
def test_is_better_than_plain_zeroing(seed, pattern):
    # Not a theorem for every row: a kept weight that is behind the loop cannot answer for what goes after it.
    weight = random(32, 64, seed=seed)
    x = random(400, 64, seed=seed + 20) + 0.7 * random(400, 1, seed=seed + 40)
    hessian = x.t() @ x
    updated, factor = weight.clone(), factorize(hessian)
    mask = prune_with_scores(updated, factor, factor.lower_II.diagonal(), pattern, 16)

    def error(w: Tensor) -> Tensor:
        return ((w - weight) @ damped(hessian) * (w - weight)).sum(1)

    assert error(updated).sum() < 0.95 * error(weight * mask).sum()


def test_diagonal_hessian_changes_no_kept_weight():
    weight, hessian = random(8, 40, dtype=torch.float32), torch.diag(torch.arange(1.0, 41))
    for pattern in (Unstructured(0.5), SemiStructured(2, 4)):
        pruned, factor = weight.clone(), factorize(hessian)
        mask = prune_with_scores(pruned, factor, factor.lower_II.diagonal(), pattern, 8)
        assert torch.equal(pruned, weight * mask)


def test_nothing_to_prune_changes_nothing():
    weight, hessian = random(8, 40, dtype=torch.float32), correlated_hessian(40).float()
    pruned, factor = weight.clone(), factorize(hessian)
    assert prune_with_scores(pruned, factor, factor.lower_II.diagonal(), Unstructured(0.0), 16).all()
    assert torch.equal(pruned, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_solved_in_float32(dtype):
    weight, factor = random(16, 48).to(dtype), factorize(correlated_hessian(48).float())
    exact = weight.float()
    mask = random(16, 48, seed=3) > 0
    prune_with_mask(weight, factor, mask, 16)
    prune_with_mask(exact, factor, mask, 16)
    assert torch.equal(weight, exact.to(dtype))
    assert not weight[~mask].any()


def test_transposed_weights_change_in_place():
    factor, stored = factorize(correlated_hessian(48).float()), random(48, 16, dtype=torch.float32)
    expected, before = stored.t().contiguous(), stored.clone()
    mask = prune_with_scores(stored.t(), factor, factor.lower_II.diagonal(), SemiStructured(2, 4), 16)
    assert torch.equal(prune_with_scores(expected, factor, factor.lower_II.diagonal(), SemiStructured(2, 4), 16), mask)
    assert torch.equal(stored.t(), expected)
    assert not torch.equal(stored, before)


def test_pruned_weights_can_be_trained():
    weight = torch.nn.Parameter(random(4, 16, dtype=torch.float32))
    mask = prune_with_scores(weight, factorize(torch.eye(16)), torch.ones(16), Unstructured(0.5), 8)
    (weight * mask).sum().backward()
    assert torch.equal(weight.grad, mask.float())


def test_threads_change_rounding_only():
    hessian, results = correlated_hessian(256).float(), []
    threads = torch.get_num_threads()
    mask = random(64, 256, seed=3) > 0
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            weight = random(64, 256, dtype=torch.float32)
            prune_with_mask(weight, factorize(hessian), mask, 128)
            results.append(weight)
    finally:
        torch.set_num_threads(threads)
    assert (results[0] - results[1]).abs().max() < 1e-5 * results[0].abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)])
def test_gpu_agrees_with_cpu(pattern):
    hessian, weight = correlated_hessian(300).float(), random(70, 300, dtype=torch.float32)
    results = []
    for device in ("cpu", "cuda"):
        factor, pruned = factorize(hessian.to(device)), weight.to(device, copy=True)
        mask = prune_with_scores(pruned, factor, factor.lower_II.diagonal(), pattern, 128)
        results.append((pruned.cpu(), mask.cpu()))
    n_of_m = (pattern.n, pattern.m) if isinstance(pattern, SemiStructured) else ()
    assert triton_obs.works(torch.device("cuda", 0), 128, *n_of_m)
    assert (results[0][1] == results[1][1]).float().mean() > 0.99
