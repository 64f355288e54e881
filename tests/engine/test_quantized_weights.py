"""Models in memory that hold quantised weights are refused, with the linear's name, before anything changes."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama, token_batches

from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Magnitude, Wanda
from wanda_lightning.sparsity import Unstructured

UP = "model.layers.1.mlp.up_proj"


def refused(model, match):
    before = {
        name: weight.detach().clone() for name, weight in model.named_parameters() if type(weight.data) is not Own
    }
    for method in (Wanda(), Magnitude()):
        with pytest.raises(ValueError, match=match):
            prune_model(model, token_batches(), method, Unstructured(0.5))
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name].view(torch.uint8), old.view(torch.uint8)) for name, old in before.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_other_dtypes(dtype):
    model = tiny_llama()
    up = model.get_submodule(UP)
    up.weight = torch.nn.Parameter(up.weight.detach().to(dtype), requires_grad=False)
    refused(model, rf"{UP} holds {dtype}, .*prune before quantising")


def test_packed_integers_are_not_taken_for_a_thin_matrix():
    model = tiny_llama()
    up = model.get_submodule(UP)
    up.weight = torch.nn.Parameter(torch.zeros(up.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    refused(model, rf"{UP} holds torch.uint8, .*prune before quantising")


def test_what_torch_itself_has_quantised():
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        model.model.layers[1].mlp = torch.ao.quantization.quantize_dynamic(model.model.layers[1].mlp, {torch.nn.Linear})
    refused(model, r"model\.layers\.1\.mlp\.gate_proj is quantised")


class Own(torch.Tensor):
    """A tensor of torchao's kind: it says that it is float32, and is not."""

    @staticmethod
    def __new__(cls, packed):
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed):
        self.packed = packed

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        return cls(args[0].packed) if function is torch.ops.aten.detach.default else NotImplemented


def test_tensors_that_only_look_like_floats():
    model = tiny_llama()
    up = model.get_submodule(UP)
    up.weight = torch.nn.Parameter(Own(up.weight.detach().to(torch.int8)), requires_grad=False)
    refused(model, rf"{UP} holds Own, .*prune before quantising")


@pytest.mark.parametrize("buffer", ["qweight", "weight_packed", "W_q"])
def test_packed_weights(buffer):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = torch.nn.Module()
    model.get_submodule(UP).register_buffer(buffer, torch.zeros(4, 64, dtype=torch.int32))
    refused(model, rf"{UP} is quantised.*prune before quantising")


def test_a_model_that_transformers_quantised():
    model = tiny_llama()
    model.hf_quantizer = SimpleNamespace()
    refused(model, r"model.layers.0.self_attn.q_proj is quantised")
