"""Convolutions in decoder layers, against torch's own convolution."""

import pytest
import torch
from torch import nn

from wanda_lightning.calibration.walk import walk
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import SparseGPT, Wanda
from wanda_lightning.model.convolutions import convolution_patches
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.linears import is_linear
from wanda_lightning.sparsity import SemiStructured, Unstructured
from wanda_lightning.statistics import InputHessian


class ConvolutionalMLP(nn.Module):
    """Sees each token's features as eight channels of a row, and mixes neighbours."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding="same")

    def forward(self, x_BTD):
        image_BCTW = x_BTD.unflatten(-1, (8, -1)).transpose(1, 2)
        return self.conv(image_BCTW).transpose(1, 2).flatten(2)


@pytest.fixture
def convolutional(llama):
    torch.manual_seed(5)
    for layer in llama.model.layers:
        layer.mlp = ConvolutionalMLP()
    return llama


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": (2, 1), "padding": (1, 2)},
        {"dilation": 2, "padding": "same"},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "reflect", "bias": False},
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_patches_times_the_weight_is_the_convolution(settings, batched):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 2), **settings).double()
    x_NCHW = torch.randn(2, 3, 7, 9, dtype=torch.float64)[slice(None) if batched else 0]
    out_NPO = convolution_patches(conv, x_NCHW) @ conv.weight.flatten(1).T
    out_NPO = out_NPO if conv.bias is None else out_NPO + conv.bias
    expected = conv(x_NCHW)
    assert torch.allclose(out_NPO.transpose(1, 2).reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_hessian_gives_the_energy_of_the_convolutions_output(convolutional, batches):
    inputs = []
    conv = convolutional.model.layers[-1].mlp.conv
    hook = conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    for batch in batches:
        convolutional(batch)
    hook.remove()
    *_, last = walk(convolutional, decoder_layers(convolutional), batches)
    hessian = last.collect(InputHessian)["model.layers.2.mlp.conv"]
    weight = torch.randn(8, 8, 3, 3, dtype=torch.float64)
    expected_C = sum(nn.functional.conv2d(x, weight, padding=1).square().sum((0, 2, 3)) for x in inputs)
    assert torch.allclose(hessian.output_energy(weight.flatten(1).float()).double(), expected_C, rtol=1e-5)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)])
def test_convolutions_are_pruned_in_place(convolutional, batches, method, pattern):
    conv = convolutional.model.layers[1].mlp.conv
    weight = conv.weight
    report = prune_model(convolutional, batches, method, pattern)
    row = next(row for row in report.linears if row.name == "model.layers.1.mlp.conv")
    assert (row.shape, row.sparsity) == ((8, 72), 0.5)
    assert conv.weight is weight
    assert (weight == 0).float().mean() == 0.5
    if isinstance(pattern, SemiStructured):
        assert ((weight.flatten(1).reshape(-1, 4) != 0).sum(-1) == 2).all()


def test_padding_cannot_be_told_from_patches(convolutional, batches):
    mask = torch.ones_like(batches[0])
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=r"mlp\.conv has .* inputs for 32 tokens.*calibrate without padding"):
        prune_model(convolutional, [{"input_ids": batches[0], "attention_mask": mask}], Wanda(), Unstructured(0.5))


def test_what_is_not_one_matrix_is_no_linear():
    assert is_linear(nn.Conv2d(4, 8, 3))
    assert not is_linear(nn.Conv2d(4, 8, 3, groups=2))
    assert not is_linear(nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last))
