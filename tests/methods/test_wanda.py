import pytest
import torch

from wanda_lightning.methods import Magnitude, Wanda
from wanda_lightning.sparsity import SemiStructured, Unstructured, parse_pattern, sparsity_of
from wanda_lightning.statistics import InputNorm


def norm_of(x: torch.Tensor) -> InputNorm:
    norm = InputNorm(x.shape[-1])
    norm.update(x)
    return norm


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def golden_masks(golden, golden_cases, kind: str):
    """Yield (pattern, weight, inputs, kept, live inputs) of the reference's masks; True was pruned there."""
    for key, mask in golden.items():
        case, _, setting = key.partition(f".{kind}.mask.")
        if setting:
            pattern = parse_pattern(setting) if ":" in setting else Unstructured(float(setting))
            dead = golden_cases[int(case.removeprefix("case"))]["dead"]
            yield pattern, golden[f"{case}.weight"], golden[f"{case}.inputs"], ~mask, slice(dead, None)


def test_golden_masks(golden, golden_cases):
    checked = 0
    for pattern, weight, inputs, kept, _live in golden_masks(golden, golden_cases, "wanda"):
        mask = Wanda().prune(weight.clone(), norm_of(inputs), pattern)
        # Dead inputs all score zero; which of several in a group of four go is the reference's topk's whim.
        clear = slice(4, None) if isinstance(pattern, SemiStructured) else slice(None)
        assert torch.equal(mask[:, clear], kept[:, clear])
        checked += 1
    assert checked >= 12


def test_golden_variant_masks(golden, golden_cases):
    checked = 0
    for pattern, weight, inputs, kept, _ in golden_masks(golden, golden_cases, "wanda_variant"):
        mask = Wanda(variant=True).prune(weight.clone(), norm_of(inputs), pattern)
        # The reference stops its search within 0.1 % or at the end of its bracket; ours is exact.
        assert (mask != kept).float().mean() < 0.002
        assert abs(sparsity_of(mask) - pattern.sparsity) < 1 / mask.numel()
        checked += 1
    assert checked >= 6


def test_score_is_weight_times_norm_compared_within_rows():
    weight, x = random(5, 12), random(40, 12, seed=1)
    mask = Wanda().prune(weight.clone(), norm_of(x), Unstructured(0.25))
    score = weight.double().abs() * torch.linalg.vector_norm(x.double(), dim=0)
    for row, kept in zip(score, mask, strict=True):
        assert (~kept).sum() == 3
        assert row[kept].min() > row[~kept].max()


def test_kept_weights_do_not_change():
    weight = random(5, 12)
    pruned = weight.clone()
    mask = Wanda().prune(pruned, norm_of(random(9, 12)), SemiStructured(1, 4))
    assert torch.equal(pruned, weight * mask)


def test_permuting_inputs_permutes_the_mask():
    weight, x, order = random(5, 12), random(9, 12, seed=1), torch.randperm(12)
    mask = Wanda().prune(weight.clone(), norm_of(x), Unstructured(0.5))
    permuted = Wanda().prune(weight[:, order].clone(), norm_of(x[:, order]), Unstructured(0.5))
    assert torch.equal(permuted, mask[:, order])


def test_scaling_a_row_leaves_its_mask():
    weight, norm = random(5, 12), norm_of(random(9, 12, seed=1))
    scaled = weight * torch.tensor([[1.0], [7.0], [0.01], [2.0], [100.0]])
    for variant in (False, True):
        method = Wanda(variant)
        a = method.prune(weight.clone(), norm, Unstructured(0.5))
        assert torch.equal(a, method.prune(scaled.clone(), norm, Unstructured(0.5)))


def test_equal_norms_give_magnitude_within_rows():
    weight = random(1, 12)
    ones = norm_of(torch.ones(3, 12))
    mask = Wanda().prune(weight.clone(), ones, Unstructured(0.5))
    assert torch.equal(mask, Magnitude().prune(weight.clone(), None, Unstructured(0.5)))


def test_variant_rows_give_up_the_same_share_of_their_score():
    weight, x = random(64, 256) * torch.rand(64, 1), random(512, 256, seed=1)
    mask = Wanda(variant=True).prune(weight.clone(), norm_of(x), Unstructured(0.6))
    score = weight.double().abs() * torch.linalg.vector_norm(x.double(), dim=0)
    lost = score.masked_fill(mask, 0).sum(1) / score.sum(1)
    following = score.masked_fill(~mask, torch.inf).amin(1) / score.sum(1)
    # One alpha fits all rows: none could lose one weight more without passing another's loss.
    assert lost.max() <= (lost + following).min()
    for row, kept in zip(score, mask, strict=True):
        assert row[kept].min() > row[~kept].max()


def test_variant_prunes_rows_without_a_score_first():
    weight = random(4, 12)
    weight[2] = 0
    mask = Wanda(variant=True).prune(weight, norm_of(random(9, 12, seed=1)), Unstructured(0.5))
    assert not mask[2].any()
    assert mask.sum() == 24


def test_variant_tells_apart_shares_that_single_precision_does_not():
    weight = torch.ones(2, 1024)
    weight[1, -1] += 1e-5  # so each of the others has a little less of the row's total
    mask = Wanda(variant=True).prune(weight, norm_of(torch.ones(1, 1024)), Unstructured(1 / 2048))
    assert (~mask).nonzero().tolist() == [[1, 0]]


def test_variant_refuses_semi_structured():
    with pytest.raises(ValueError, match=r"variant prunes unstructured patterns only, got 2:4"):
        Wanda(variant=True).check(SemiStructured(2, 4))


def test_bfloat16_weights():
    weight = random(8, 32).bfloat16()
    mask = Wanda().prune(weight, norm_of(random(9, 32)), Unstructured(0.5))
    assert mask.sum(1).tolist() == [16] * 8
    assert not weight[~mask].any()
