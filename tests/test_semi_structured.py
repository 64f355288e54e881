"""2:4-pruned linears on torch's sparse kernels: what is converted, what is not, and why; the kernels need a GPU."""

import logging

import pytest
import torch
from conftest import tiny_llama, token_batches
from test_experts import mixtral
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from wanda_lightning import Magnitude, SemiStructured, Unstructured, prune_model, semi_structured, to_semi_structured
from wanda_lightning.decoder import decoder_layers

SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}


class OnTheCPU:
    """torch's own packing to half the values and back, which runs anywhere; what is not 2:4 comes back wrong."""

    _DTYPE_SHAPE_CONSTRAINTS = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS

    @staticmethod
    def from_dense(weight):
        return sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(semi_structured, "_backend", lambda device: OnTheCPU)


def pruned(pattern=SemiStructured(2, 4), dtype=torch.bfloat16, **prune):  # noqa: B008 (frozen)
    model = tiny_llama(**SIZE)
    prune_model(model, None, Magnitude(), pattern, **prune)
    return model.to(dtype)


def logits(model):
    with torch.no_grad():
        return model(token_batches()[0]).logits


def test_what_is_converted_computes_the_same(on_the_cpu, caplog):
    model = pruned()
    expected = logits(model)
    with caplog.at_level(logging.INFO, logger="wanda_lightning"):
        conversion = to_semi_structured(model)
    assert conversion.converted == [linear.name for layer in decoder_layers(model) for linear in layer.linears]
    assert conversion.skipped == {}
    assert torch.equal(logits(model), expected)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert "21 linears are computed by 2:4 sparse kernels" in caplog.text


def test_what_is_not_2_of_4_is_left_alone_and_named(on_the_cpu):
    model = pruned(ignore=["layers.1.mlp.down_proj"])
    weight = model.model.layers[2].self_attn.q_proj.weight
    with torch.no_grad():
        weight[5, 4:8] = torch.tensor([1.0, 0.0, 2.0, 3.0])  # one group among thousands
    expected = logits(model)
    conversion = to_semi_structured(model)
    assert conversion.skipped == dict.fromkeys(
        ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj"],
        "more than two of four consecutive inputs are not zero",
    )
    assert len(conversion.converted) == 21 - 2
    assert model.model.layers[2].self_attn.q_proj.weight is weight
    assert torch.equal(logits(model), expected)
    assert not torch.equal(OnTheCPU.from_dense(weight.detach()), weight)  # torch would have lost a weight, in silence


def test_sparser_than_2_of_4_will_do(on_the_cpu):
    assert len(to_semi_structured(pruned(SemiStructured(1, 4))).converted) == 21


def test_shapes_and_types_have_torchs_limits(on_the_cpu):
    limits = OnTheCPU._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16]
    model = pruned()
    layer = model.model.layers[0]
    narrow = nn.Linear(limits.sparse_min_cols * 2, limits.sparse_min_rows - 4, dtype=torch.bfloat16)
    short = nn.Linear(limits.sparse_min_cols + 4, limits.sparse_min_rows, dtype=torch.bfloat16)
    layer.self_attn.k_proj, layer.self_attn.v_proj = narrow, short
    layer.self_attn.q_proj.float()
    layer.self_attn.o_proj.to("meta")
    skipped = to_semi_structured(model).skipped
    assert {name.removeprefix("model.layers.0.self_attn."): reason for name, reason in skipped.items()} == {
        "k_proj": "(28, 128) are no multiples of (32, 64)",
        "v_proj": "(32, 68) are no multiples of (32, 64)",
        "q_proj": "float32 is none of float16, bfloat16, int8",
        "o_proj": "the weight is on meta",
    }


def test_targets_and_ignored(on_the_cpu):
    conversion = to_semi_structured(pruned(), targets=["mlp.*"], ignore=["layers.0.*"])
    assert len(conversion.converted) == 2 * 3
    assert set(conversion.skipped.values()) == {"ignored", "no target"}
    with pytest.raises(ValueError, match="matches no linear"):
        to_semi_structured(pruned(), targets=["nothing"])


def test_fused_experts_stay_as_they_are(on_the_cpu):
    model = mixtral(hidden_size=128, head_dim=32, intermediate_size=64, num_key_value_heads=4)
    prune_model(model, None, Magnitude(), SemiStructured(2, 4))
    conversion = to_semi_structured(model.to(torch.float16))
    assert all("self_attn" in name for name in conversion.converted)
    assert conversion.skipped["model.layers.0.mlp.experts.down_proj.3"].startswith("experts that are fused")
    assert conversion.skipped["model.layers.0.mlp.gate.weight"] == "router"


def test_nothing_to_convert_is_an_error(on_the_cpu):
    model = pruned(Unstructured(0.5))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"nothing can be converted: 0 linears.*21 not: more than two of four"):
        to_semi_structured(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="21 not: float32 is none of"):
        to_semi_structured(pruned(dtype=torch.float32))


def test_a_model_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="need a CUDA GPU, and the model is on cpu"):
        to_semi_structured(pruned())


def test_old_gpus_are_refused_and_the_backend_is_one_there_is(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(ValueError, match=r"capability 8\.0 or newer, Tesla V100 has 7\.0"):
        semi_structured._backend(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert semi_structured._backend(device) is SparseSemiStructuredTensorCUSPARSELT
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    assert semi_structured._backend(device) is SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", False)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert semi_structured._backend(device) is SparseSemiStructuredTensorCUTLASS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_the_kernels_compute_what_dense_ones_do(dtype, length):
    model = pruned(dtype=dtype).cuda()
    ids = torch.arange(length, device="cuda").unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits.float()
        assert len(to_semi_structured(model).converted) == 21
        torch.testing.assert_close(model(ids).logits.float(), expected, atol=0.02 * float(expected.std()), rtol=0.02)
