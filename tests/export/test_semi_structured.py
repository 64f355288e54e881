"""2:4-pruned linears on torch's sparse kernels: what is converted, what is not, and why; the kernels need a GPU."""

import logging

import pytest
import torch
from helpers import mixtral, tiny_llama, token_batches
from torch import nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from wanda_lightning import Magnitude, SemiStructured, Unstructured, prune_model, to_semi_structured
from wanda_lightning.export import semi_structured
from wanda_lightning.model.decoder import decoder_layers

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


def test_linears_that_compute_in_a_way_of_their_own(on_the_cpu):
    class Transposing(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    model = pruned()
    layer = model.model.layers[0].mlp
    layer.up_proj = Transposing(128, 256, dtype=torch.bfloat16)
    assert to_semi_structured(model).skipped == {
        "model.layers.0.mlp.up_proj": "Transposing computes in a way of its own"
    }


def test_torchs_own_tensors_become_the_weights(monkeypatch):
    """All but the kernels: they are made and set here, and a second conversion leaves them alone."""

    class Unchecked(SparseSemiStructuredTensorCUTLASS):
        @classmethod
        def _validate_device_dim_dtype_shape(cls, original_tensor):
            pass

    monkeypatch.setattr(semi_structured, "_backend", lambda device: Unchecked)
    model = pruned(ignore=["v_proj"])
    dense = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with pytest.warns(UserWarning, match="prototype"):
        to_semi_structured(model, ignore=["layers.2.*"])
    weight = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight.data, Unchecked)
    assert torch.equal(weight.to_dense(), dense)
    assert len(to_semi_structured(model).converted) == 6
    with pytest.raises(ValueError, match=r"18 not: the weight is no plain tensor.*3 not: more than two of four"):
        to_semi_structured(model)


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


@pytest.mark.parametrize(
    ("capability", "cusparselt", "force_cutlass", "expected"),
    [
        ((7, 0), True, False, r"capability 8\.0 or newer, not A GPU \(compute capability 7\.0\)"),
        ((8, 0), True, False, SparseSemiStructuredTensorCUSPARSELT),
        ((8, 6), True, True, SparseSemiStructuredTensorCUTLASS),
        ((8, 9), False, False, SparseSemiStructuredTensorCUTLASS),
        ((9, 0), True, False, SparseSemiStructuredTensorCUSPARSELT),
        ((9, 0), False, False, "needs cuSPARSELt, which this torch lacks"),
        ((12, 0), True, True, "needs cuSPARSELt"),
    ],
)
def test_the_backend_is_one_that_the_gpu_has_kernels_for(monkeypatch, capability, cusparselt, force_cutlass, expected):
    """As torch's own checks: its CUTLASS kernels refuse all but 8.x."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", force_cutlass)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            semi_structured._backend(torch.device("cuda"))
    else:
        assert semi_structured._backend(torch.device("cuda")) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_the_kernels_compute_what_dense_ones_do(dtype, length):
    model = pruned(dtype=dtype).cuda()
    ids = torch.arange(length, device="cuda").unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits.float()
        assert len(to_semi_structured(model).converted) == 21
        assert isinstance(model.model.layers[0].mlp.up_proj.weight.data, SparseSemiStructuredTensor)
        torch.testing.assert_close(model(ids).logits.float(), expected, atol=0.02 * float(expected.std()), rtol=0.02)
