"""Quantised checkpoints: FP8 and MXFP4 become plain weights, all others are refused before anything is loaded."""

import json

import pytest
import torch
from helpers import tiny_llama, token_batches
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
)

from wanda_lightning.checkpoints.loading import load_model, load_streamed
from wanda_lightning.checkpoints.quantization import _method, dense_settings
from wanda_lightning.checkpoints.saving import save_pretrained
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.inspection import inspect_model
from wanda_lightning.methods import Magnitude, Wanda
from wanda_lightning.sparsity import Unstructured

HALF = Unstructured(0.5)
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # OCP MX, table 4: e2m1
SCALE = 2.0 ** (122 - 127)


def rewrite(folder, tensors, quantization):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    say_quantized(folder, quantization)


def say_quantized(folder, quantization):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def fp8(folder, block=(128, 128)):
    """Store the linears of a model in FP8, with one scale a block or one a tensor; return what they stand for."""
    tiny_llama(hidden_size=128, intermediate_size=256).bfloat16().save_pretrained(folder)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if "proj" in name:
            scale = torch.tensor(float(weight.abs().max()) / 448)
            stored[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            meant[name] = (stored[name].float() * scale).bfloat16()
            blocks = [-(-size // 128) for size in weight.shape] if block else []
            stored[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and [*block]}
    rewrite(folder, stored, settings)
    return meant


def mxfp4(folder):
    """Store the experts of a model as gpt-oss does: two numbers a byte, a power of two for every 32."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = weight.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            stored[f"{name}_blocks"] = blocks
            stored[f"{name}_scales"] = torch.full(blocks.shape[:-1], 122, dtype=torch.uint8)
            numbers = torch.stack([FP4[(blocks & 15).int()], FP4[(blocks >> 4).int()]], dim=-1) * SCALE
            meant[name] = numbers.reshape(experts, outputs, inputs).transpose(1, 2).bfloat16()
        else:
            stored[name] = meant[name] = weight
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    rewrite(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return meant


def fp8_per_tensor(folder):
    return fp8(folder, block=None)


def by_transformers(folder):
    """What users do who do not know of load_model."""
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("load", [load_model, by_transformers])
@pytest.mark.parametrize("quantize", [fp8, fp8_per_tensor, mxfp4])
def test_pruned_and_saved_as_plain_weights(quantize, load, tmp_path):
    meant = quantize(tmp_path / "quantized")
    model = load(str(tmp_path / "quantized"))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, meant[name]), name
    prune_model(model, None, Magnitude(), HALF)
    folder = save_pretrained(model, None, tmp_path / "pruned")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    saved = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert saved.keys() == meant.keys()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, saved[name]), name
        if "proj" in name and "bias" not in name:
            assert (weight == 0).float().mean() >= 0.5
    x = token_batches()[0]
    with torch.no_grad():
        assert torch.equal(load_model(str(folder))(x).logits, model(x).logits)


def test_in_another_dtype(tmp_path):
    meant = fp8(tmp_path)
    model = load_model(str(tmp_path), "float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(weight.bfloat16(), meant[name]) for name, weight in model.named_parameters())
    with pytest.raises(ValueError, match="de-quantised to bfloat16 where it is streamed, got dtype 'float32'"):
        load_streamed(str(tmp_path), "float32")


def test_streamed(tmp_path):
    fp8(tmp_path / "quantized")
    streamed, whole = load_streamed(str(tmp_path / "quantized")), load_model(str(tmp_path / "quantized"))
    prune_model(streamed, token_batches(), Wanda(), HALF, journal=Journal(tmp_path / "journal"))
    prune_model(whole, token_batches(), Wanda(), HALF)
    loaded = load_model(str(save_pretrained(streamed, None, tmp_path / "pruned")))
    for (name, expected), weight in zip(whole.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(weight, expected), name


REFUSED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "hqq": {"quant_method": "hqq"},
    "next year's": {"quant_method": "next year's"},
}


@pytest.mark.parametrize("load", [load_model, load_streamed, inspect_model])
@pytest.mark.parametrize("method", REFUSED)
def test_others_are_refused_in_a_line_before_weights_are_read(method, load, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing that could be loaded")
    say_quantized(tmp_path, REFUSED[method])
    with pytest.raises(ValueError, match=rf"is quantised \({method}\), .*prune before quantising") as refused:
        load(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["whole", "text"])
def test_models_of_several_parts_say_it_of_the_whole_or_of_the_one_that_writes_text(part):
    config = Gemma3Config()
    said = config if part == "whole" else config.text_config
    said.quantization_config = REFUSED["gptq"]
    with pytest.raises(ValueError, match=r"is quantised \(gptq\)"):
        dense_settings(config, "model")


@pytest.mark.parametrize("method", ["fp8", "mxfp8", "mxfp4"])
def test_plain_weights_are_asked_for(method):
    """On a CPU they come unasked, too."""
    settings = dense_settings(LlamaConfig(quantization_config={"quant_method": method}), "model")
    assert settings["quantization_config"].dequantize


@pytest.mark.parametrize(("said", "method"), [({"load_in_8bit": True}, "bitsandbytes"), ({"bits": 4}, "?"), ({}, None)])
def test_what_older_configs_say(said, method):
    assert _method(said) == method


def test_a_config_for_quantising_while_loading_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"would be quantised \(bitsandbytes\)"):
        load_model(str(tmp_path), quantization_config=BitsAndBytesConfig(load_in_4bit=True))
