import pytest
import torch

from wanda_lightning.methods import Magnitude
from wanda_lightning.sparsity import SemiStructured, Unstructured


def weight() -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


def test_the_smallest_weights_of_the_matrix_go():
    dense = weight()
    pruned = dense.clone()
    mask = Magnitude().prune(pruned, None, Unstructured(0.5))
    assert (~mask).sum() == 48
    assert dense[mask].abs().min() > dense[~mask].abs().max()
    assert torch.equal(pruned, dense * mask)


def test_semi_structured_groups_lie_within_rows():
    dense = weight()
    mask = Magnitude().prune(dense.clone(), None, SemiStructured(2, 4))
    groups, kept = dense.abs().view(-1, 4), mask.view(-1, 4)
    for group, keep in zip(groups, kept, strict=True):
        assert keep.sum() == 2
        assert group[keep].min() > group[~keep].max()


def test_sparsity_zero_changes_nothing():
    dense = weight()
    pruned = dense.clone()
    assert Magnitude().prune(pruned, None, Unstructured(0.0)).all()
    assert torch.equal(pruned, dense)


def test_pruned_weights_are_plain_zeros_in_a_transposed_view():
    stored = weight().t().contiguous()
    mask = Magnitude().prune(stored.t(), None, Unstructured(0.5))
    zeros = stored[~mask.t()]
    assert not zeros.any()
    assert not torch.signbit(zeros).any()


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [(Unstructured(0.5), [1, 1, 1, 1, 0, 0, 0, 0]), (SemiStructured(2, 4), [0, 1, 0, 1, 1, 1, 0, 0])],
)
def test_weights_that_only_float64_tells_apart(pattern, kept):
    weight = 1 + 1e-12 * torch.tensor([[6, 8, 5, 7, 4, 3, 1, 2]], dtype=torch.float64)
    assert Magnitude().prune(weight, None, pattern).int().tolist() == [kept]
