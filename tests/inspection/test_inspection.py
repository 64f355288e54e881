import json
import math
from io import StringIO

import numpy as np
import pytest
import torch
from helpers import tiny_llama, token_batches
from rich.console import Console
from transformers import AutoModelForCausalLM, HrmTextConfig

from wanda_lightning.calibration.walk import walk
from wanda_lightning.inspection.inspect_model import inspect_model
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.statistics import InputNorm


@pytest.fixture
def config_only(tmp_path):
    """A folder with a config and no weights."""
    tiny_llama(layers=4).config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_lists_what_pruning_would_touch(config_only):
    inspection = inspect_model(config_only)
    model = tiny_llama(layers=4)
    linears = [linear for layer in decoder_layers(model) for linear in layer.linears]
    assert sum(kind.count for kind in inspection.kinds) == len(linears) == 28
    assert {kind.name: kind.shape for kind in inspection.kinds} == {
        linear.name.removeprefix("model.layers.0."): tuple(linear.weight_OI.shape) for linear in linears[:7]
    }
    assert inspection.layers == [f"model.layers.{i}" for i in range(4)]
    assert inspection.coverage == 1.0
    assert inspection.parameters == model.num_parameters()


def test_groups_are_those_of_the_walk(config_only):
    model = tiny_llama(layers=4)
    with torch.no_grad():
        statistics = next(iter(walk(model, decoder_layers(model), token_batches()))).collect(InputNorm)
    groups = {kind.name: kind.input_group for kind in inspect_model(config_only).kinds}
    for a, first in statistics.items():
        for b, second in statistics.items():
            same = groups[a.removeprefix("model.layers.0.")] == groups[b.removeprefix("model.layers.0.")]
            assert same == (first is second)


def test_memory(config_only):
    memory = inspect_model(config_only, num_samples=10, sequence_length=100, dtype="bfloat16").memory
    model = tiny_llama(layers=4)
    assert memory["weights of the model"] == 2 * model.num_parameters()
    assert memory["weights of its largest layer"] == 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert memory["calibration activations"] == 2 * 10 * 100 * 32
    assert memory["calibration activations, one pass"] == 2 * 10 * 100 * (64 + 3 * 32)
    # Four inputs in a layer, three of width 32 and one of 64; the factor and its scratch are of the widest.
    assert memory["SparseGPT, Ablate, besides"] == 4 * (3 * 32**2 + 64**2 + 2 * 64**2)
    # The dense stream; 19 bytes for each weight of a layer, and what its seven linears see and give of one window.
    weights, features = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64, 2 * 64 + 2 * 48 + 3 * 96
    assert memory["reconstruction, besides"] == 2 * 10 * 100 * 32 + 19 * weights + 2 * 100 * features
    assert memory["dense target, besides"] == 2 * 10 * 100 * (32 + 3 * 32 + 64 + 2 * 32) + 28 * 64**2


def test_what_waits_in_one_pass_is_what_the_engine_asks_for(config_only):
    memory = inspect_model(config_only, num_samples=8, sequence_length=16, dtype="float32").memory
    model = tiny_llama(layers=4)
    with torch.no_grad():
        first = next(iter(walk(model, decoder_layers(model), token_batches())))  # four batches of 2 x 16 tokens
    waiting = max(held.nbytes for held in first.waiting().values())
    assert memory["calibration activations, one pass"] == memory["calibration activations"] + waiting


def test_streaming_spares_all_layers_but_one(config_only):
    memory = inspect_model(config_only, dtype="bfloat16").memory
    layer = 2 * sum(p.numel() for p in tiny_llama().model.layers[0].parameters())
    in_memory, streamed = "without activations, in memory", "without activations, streamed"
    assert memory[f"Wanda {in_memory}"] - memory[f"Wanda {streamed}"] == 3 * layer
    # The widest Hessian alone is as large as the layer that it belongs to; then the others wait for another pass.
    assert layer < 4 * (3 * 32**2 + 64**2)
    others = 4 * (3 * 32**2 + 64**2) - max(layer, 4 * 64**2)
    assert memory[f"SparseGPT {in_memory}"] - memory[f"SparseGPT {streamed}"] == 3 * layer + others


@pytest.mark.parametrize("cycles", [1, 2])
def test_layers_that_are_called_again_take_time_and_memory_again(tmp_path, monkeypatch, cycles):
    """HRM-Text goes through one list after each time through the other; Hessians of all wait for the last calls."""
    config = HrmTextConfig(
        hidden_size=32, intermediate_size=64, num_layers_per_stack=2, num_attention_heads=2, head_dim=16, vocab_size=64,
        H_cycles=cycles, L_cycles=1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model, calls = AutoModelForCausalLM.from_config(config), []
    for layer in decoder_layers(model):
        layer.module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.zeros(1, 8, dtype=torch.long))
    monkeypatch.setattr("wanda_lightning.inspection.estimates.product_rate", lambda *_: 1.0)
    monkeypatch.setattr("wanda_lightning.inspection.estimates.sorting_rate", lambda _: math.inf)
    inspection = inspect_model(tmp_path, num_samples=1, sequence_length=16)
    once = 2 * 16 * sum(x.count * x.shape[0] * x.shape[1] for x in inspection.kinds) + 4 * 2 * 16**2 * 2 * 16
    assert len(calls) == 4 * cycles
    assert inspection.seconds["Wanda"] == cycles * once
    # Of each of four layers: what enters the attention, its last linear, the MLP and its last linear; the factor.
    hessians = 4 * (3 * 32**2 + 64**2) * (1 if cycles == 1 else 4)
    assert inspection.memory["SparseGPT, Ablate, besides"] == hessians + 4 * 2 * 64**2


def test_experts_see_a_share_of_the_tokens(tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=8, num_experts_per_tok=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    inspection = inspect_model(str(tmp_path))
    experts = {kind.name: kind for kind in inspection.kinds if "experts" in kind.name}
    assert {name: kind.count for name, kind in experts.items()} == {
        "mlp.experts.gate_up_proj.*": 2 * 8,
        "mlp.experts.down_proj.*": 2 * 8,
    }
    assert {kind.tokens for kind in experts.values()} == {2 / 8}
    assert inspection.coverage > 0.95


def test_the_table_reads_well(config_only):
    console = Console(width=100, record=True, file=StringIO())
    console.print(inspect_model(config_only).to_table())
    text = console.export_text()
    assert "4 decoder layers (model.layers.0 to model.layers.3)" in text
    assert "mlp.down_proj" in text
    assert "100.00% of the matrix weights" in text


def test_windows_are_no_longer_than_the_model_takes(config_only):
    assert "128 windows of 128 tokens" in inspect_model(config_only).timed_for


def test_the_folder_of_a_run(llama, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    assert inspect_model(tmp_path).weights.nbytes == (tmp_path / "model/model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": -5}, "num_samples must be a whole number of at least 1, got -5"),
        ({"sequence_length": 1}, "sequence_length must be a whole number of at least 2, got 1"),
        ({"sequence_length": 129}, "sequence_length must be at most 128, the model's .* got 129"),
        ({"dtype": "bf16"}, "dtype must be .* got 'bf16'"),
        ({"device": "nothing"}, "device 'nothing' cannot be used here"),
    ],
)
def test_bad_settings_are_named(config_only, settings, message):
    with pytest.raises(ValueError, match=message):
        inspect_model(config_only, **settings)


def test_devices_and_dtypes_are_those_of_torch_too(config_only):
    named = inspect_model(config_only, dtype="bfloat16", device="cpu")
    given = inspect_model(config_only, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (given.memory, given.timed_for) == (named.memory, named.timed_for)


def test_where_the_config_names_no_dtype_the_files_do(tmp_path):
    from wanda_lightning.checkpoints.loading import load_model

    tiny_llama().bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    size = sum(parameter.nbytes for parameter in load_model(tmp_path).parameters())
    assert inspect_model(tmp_path).memory["weights of the model"] == size


def test_a_missing_model_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        inspect_model(str(tmp_path))


def test_numpys_numbers_are_those_of_python(config_only):
    assert "4 windows of 32 tokens" in inspect_model(config_only, np.int64(4), np.int16(32)).timed_for
