import pytest
import torch

from wanda_lightning.methods import RIA, Magnitude
from wanda_lightning.sparsity import SemiStructured, Unstructured, sparsity_of
from wanda_lightning.statistics import InputNorm


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_of(x: torch.Tensor) -> InputNorm:
    norm = InputNorm(x.shape[-1])
    norm.update(x)
    return norm


def loop(weight: torch.Tensor, x: torch.Tensor, power: float) -> list[list[float]]:
    """The score of every weight by the formula, one Python float at a time."""
    size = [[abs(value) for value in row] for row in weight.double().tolist()]
    norm = [sum(value**2 for value in column) ** 0.5 for column in x.double().t().tolist()]
    return [
        [
            (size[i][j] / sum(row[j] for row in size) + size[i][j] / sum(size[i])) * norm[j] ** power
            for j in range(len(norm))
        ]
        for i in range(len(size))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [0, 0.5, 1.0])
def test_score_equals_a_loop(power, dtype):
    weight, x = random(6, 12).to(dtype), random(40, 12, seed=1) * torch.linspace(0.1, 9, 12)
    score = RIA(power).score(weight, norm_of(x))
    torch.testing.assert_close(score.double(), torch.tensor(loop(weight, x, power)).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("pattern", "group"), [(Unstructured(0.5), 72), (Unstructured(0.3), 72), (SemiStructured(2, 4), 4)]
)
def test_the_lowest_of_the_matrix_or_of_their_group_go(pattern, group):
    weight, x = random(6, 12), random(40, 12, seed=1)
    scores = torch.tensor(loop(weight, x, 0.5)).reshape(-1, group)
    pruned = weight.clone()
    mask = RIA().prune(pruned, norm_of(x), pattern)
    count = int(group * pattern.sparsity)
    for row, kept in zip(scores.tolist(), mask.reshape(-1, group).tolist(), strict=True):
        lowest = sorted(range(group), key=row.__getitem__)[:count]
        assert [j for j in range(group) if not kept[j]] == sorted(lowest)
    assert torch.equal(pruned, weight * mask)


def test_all_zero_rows_columns_and_inputs():
    weight, x = random(6, 12), random(40, 12, seed=1)
    weight[2], weight[:, 5], x[:, 7] = 0, 0, 0
    score = RIA().score(weight, norm_of(x))
    assert score.isfinite().all()
    assert not score[2].any()
    assert not score[:, [5, 7]].any()


def test_a_small_output_keeps_weights():
    """Sizes count by their share of the row, too: a row of small weights is not emptied, as it is by magnitude."""
    weight, norm = random(8, 32), norm_of(random(40, 32, seed=1))
    weight[0] *= 1e-3
    assert not Magnitude().prune(weight.clone(), None, Unstructured(0.2))[0].any()
    assert RIA().prune(weight, norm, Unstructured(0.2))[0].sum() > 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_transposed_weights(dtype):
    stored = random(32, 8).to(dtype)
    mask = RIA().prune(stored.t(), norm_of(random(9, 32)), Unstructured(0.5))
    assert sparsity_of(mask) == 0.5
    assert torch.equal(stored.t() != 0, mask)


@pytest.mark.parametrize("power", [-0.5, float("nan"), float("inf"), True, "0.5"])
def test_bad_power(power):
    with pytest.raises(ValueError, match="power must be a finite number of at least 0"):
        RIA(power)


def test_prints_its_settings():
    assert str(RIA()) == "RIA(power=0.5)"
