"""Masks alone, without a Trainer."""

import pytest
import torch
from torch import nn

from wanda_lightning.training.masks import WeightMasks


def half_zero(rows: int = 4, columns: int = 6, dtype=torch.float32) -> nn.Parameter:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, dtype=dtype)
    weight[:, ::2] = 0
    return nn.Parameter(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_and_weights_are_masked_where_the_weight_was_zero(dtype):
    weight = half_zero(dtype=dtype)
    masks = WeightMasks({"w": weight})
    weight.grad = torch.ones_like(weight)
    masks.mask_gradients()
    assert torch.equal(weight.grad, (weight != 0).to(dtype))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, ::2] = 3.0
    masks.mask_weights()
    assert torch.equal(weight, kept)


def test_a_gradient_that_overflows_counts_only_where_the_weight_was_kept():
    weight = half_zero()
    masks = WeightMasks({"w": weight})
    weight.grad = torch.full_like(weight, float("inf"))
    weight.grad[:, 1::2] = 1.0
    masks.mask_gradients()
    assert torch.equal(weight.grad, (weight != 0).float())


def test_dense_weights_need_no_mask_and_a_mask_is_one_byte_a_weight():
    masks = WeightMasks({"dense": nn.Parameter(torch.ones(8, 8)), "pruned": half_zero(8, 8)})
    ((name, _, mask),) = masks.masks
    assert name == "pruned"
    assert mask.untyped_storage().nbytes() == 64


def test_frozen_weights_are_left_alone_but_checked():
    weight = half_zero()
    weight.requires_grad_(False)
    masks = WeightMasks({"w": weight})
    weight[0, 0] = 1.0
    masks.mask_weights()
    assert weight[0, 0] == 1.0
    with pytest.raises(RuntimeError, match=r"1 linears are no longer zero \(w\)"):
        masks.check()


def test_check_names_every_linear_that_lost_a_zero():
    weights = {name: half_zero() for name in "abcd"}
    masks = WeightMasks(weights)
    masks.check()
    with torch.no_grad():
        weights["b"][1, 2] = 1e-30
        weights["d"][3, 4] = float("nan")
    with pytest.raises(RuntimeError, match=r"2 linears are no longer zero \(b, d\)"):
        masks.check()


def test_kept_weights_may_be_anything():
    weight = half_zero()
    masks = WeightMasks({"w": weight})
    with torch.no_grad():
        weight[0, 1], weight[0, 3] = float("nan"), 0.0
    masks.check()


def test_copies_are_held_to_the_same_zeros():
    weight, other = half_zero(), half_zero()
    copy = torch.ones_like(weight)
    WeightMasks({"w": weight, "other": other}).mask_copies({weight: copy})
    assert torch.equal(copy, (weight != 0).float())
