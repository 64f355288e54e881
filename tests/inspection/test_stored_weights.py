"""What `inspect` says of the weights in a folder."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from helpers import mixtral, tiny_llama
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    HrmTextConfig,
    HrmTextForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from wanda_lightning import Magnitude, SemiStructured, Unstructured, prune_model
from wanda_lightning.cli.inspect import main
from wanda_lightning.engine.measured_sparsity import measure_whole_model
from wanda_lightning.export.compression import compress
from wanda_lightning.inspection.inspect_model import inspect_model
from wanda_lightning.report.pruning_report import PruningReport


@pytest.fixture(autouse=True)
def nothing_is_timed(monkeypatch):
    monkeypatch.setattr("wanda_lightning.inspection.speed._rate", lambda *_: 1e9)


def saved(model, folder: Path, pattern=Unstructured(0.5), **save):  # noqa: B008 (frozen)
    """Prune a model by magnitude and save it, with the report beside it; returns the weights as inspected."""
    report = prune_model(model, None, Magnitude(), pattern)
    model.save_pretrained(folder, **save)
    report.save(folder)
    return inspect_model(str(folder)).weights


def text_of(weights) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(weights.to_table())
    return console.export_text()


def change(folder: Path, edit) -> None:
    """Edit the stored tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_sparsity_is_that_of_the_model(tmp_path, shards):
    model = tiny_llama()
    weights = saved(model, tmp_path, Unstructured(0.37), **shards)
    modules = dict(model.named_modules())
    assert len(weights.linears) == 21
    assert weights.files == len(list(tmp_path.glob("*.safetensors")))
    assert (weights.files > 1) == bool(shards)
    for linear in weights.linears:
        weight = modules[linear.name].weight
        assert linear.shape == tuple(weight.shape)
        assert linear.zeros == int((weight == 0).sum())
        assert linear.layer == int(linear.name.split(".")[2])
        assert linear.kind == linear.name.partition(f".{linear.layer}.")[2]
    assert weights.pattern is None
    assert weights.check.loads_whole
    total = sum(p.numel() for p in model.parameters())
    assert sum(linear.zeros for linear in weights.linears) / total == pytest.approx(measure_whole_model(model))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_dense_model_has_no_table_of_zeros(tmp_path, sparsity):
    weights = saved(tiny_llama(), tmp_path, Unstructured(sparsity))
    assert ("zeros in layer" in text_of(weights)) == (sparsity > 0)


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:2", "2:4", "4:8", "3:4", "3:16"])
def test_the_tightest_pattern_is_found(tmp_path, pattern):
    n, m = map(int, pattern.split(":"))
    weights = saved(tiny_llama(), tmp_path, SemiStructured(n, m))
    assert weights.pattern == pattern
    assert weights.exceptions == []
    assert f"Every one of them is {pattern}" in text_of(weights)


def test_exceptions_are_named(tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][7, 4:8] = torch.tensor([1.0, 2.0, 0.0, 3.0])  # three in one group
        tensors["model.layers.2.self_attn.k_proj.weight"] += 1  # dense

    saved(tiny_llama(), tmp_path, SemiStructured(2, 4))
    change(tmp_path, spoil)
    weights = inspect_model(str(tmp_path)).weights
    assert weights.pattern == "2:4"
    assert [linear.name for linear in weights.exceptions] == [
        "model.layers.1.mlp.up_proj",
        "model.layers.2.self_attn.k_proj",
    ]
    assert [linear.patterns for linear in weights.exceptions][1] == []
    assert len(weights.contradictions) == 1  # one weight more is no contradiction, a dense matrix is
    text = text_of(weights)
    assert "2:4, but for 2: model.layers.1.mlp.up_proj (49.95% zeros" in text
    assert "Fewer zeros than reported in model.layers.2.self_attn.k_proj (0.00% zeros, no n:m pattern)" in text


def test_an_exception_that_comes_first_does_not_set_the_pattern(tmp_path):
    saved(tiny_llama(), tmp_path, SemiStructured(2, 4))
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(16)
    change(tmp_path, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].fill_(1).mul_(mask))
    weights = inspect_model(str(tmp_path)).weights
    assert weights.linears[0].patterns == ["3:4", "6:8"]
    assert (weights.pattern, weights.exceptions) == ("2:4", weights.linears[:1])


def test_layers_that_read_the_same_share_a_row(tmp_path):
    saved(tiny_llama(layers=6), tmp_path, SemiStructured(2, 4))
    change(tmp_path, lambda tensors: tensors["model.layers.3.self_attn.q_proj.weight"].fill_(1))
    _, rows = inspect_model(str(tmp_path)).weights.by_layer_and_kind()
    assert [row[0] for row in rows] == ["0 to 2", "3", "4 to 5"]
    header, _ = inspect_model(str(tmp_path)).weights.by_layer_and_kind()
    assert rows[1][header.index("q_proj")] == "0.0%"


def test_the_inputs_of_conv1d_are_its_rows(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    weights = saved(model, tmp_path, SemiStructured(2, 4))
    assert len(weights.linears) == 8
    assert weights.pattern == "2:4"
    assert {linear.shape for linear in weights.linears if linear.kind == "attn.c_attn"} == {(96, 32)}

    def as_on_the_hub(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    change(tmp_path, as_on_the_hub)
    again = inspect_model(str(tmp_path)).weights
    assert again.linears == weights.linears
    assert again.check.loads_whole


@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)])
def test_experts_are_stored_one_by_one(tmp_path, pattern):
    model = mixtral()
    weights = saved(model, tmp_path, pattern)
    experts = [linear for linear in weights.linears if "experts" in linear.kind]
    assert len(experts) == 2 * 4 * 3
    assert {linear.kind for linear in experts} == {f"block_sparse_moe.experts.*.{w}" for w in ("w1", "w2", "w3")}
    assert len(weights.linears) == len(experts) + 2 * 4  # attention; no router
    zeros = sum(int((p == 0).sum()) for p in model.model.layers.parameters())
    assert sum(linear.zeros for linear in weights.linears) == zeros
    assert weights.pattern == (None if isinstance(pattern, Unstructured) else "2:4")
    assert weights.check.loads_whole
    change(tmp_path, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.1.w1.weight"))
    assert not inspect_model(str(tmp_path)).weights.check.loads_whole


def test_fused_experts_that_are_stored_fused(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    weights = saved(GptOssForCausalLM(config).eval(), tmp_path, SemiStructured(2, 4))
    assert weights.check.loads_whole
    assert weights.pattern == "2:4"
    assert weights.exceptions == []
    assert sum("experts" in linear.kind for linear in weights.linears) == 2 * 4 * 2


def granite_moe():
    """Its experts are fused in its files, too, under another name."""
    config = GraniteMoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return GraniteMoeForCausalLM(config).eval()


def nemotron_h():
    """Its list of layers has another name in files."""
    config = NemotronHConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, layers_block_type=["mamba", "mlp", "attention", "mlp"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_num_heads=4, mamba_head_dim=8, n_groups=1,
        ssm_state_size=8, chunk_size=8, max_position_embeddings=64,
    )  # fmt: skip
    return NemotronHForCausalLM(config).eval()


@pytest.mark.parametrize("make", [granite_moe, nemotron_h])
def test_what_files_have_under_another_name_is_what_was_pruned(make, tmp_path):
    weights = saved(make(), tmp_path, SemiStructured(2, 4))
    pruned = PruningReport.from_dict(json.loads((tmp_path / "pruning.json").read_text())).linears
    assert {(x.name, x.sparsity) for x in weights.linears} == {(row.name, 0.5) for row in pruned}


def test_linears_of_two_lists_that_are_one_matrix_in_files(tmp_path):
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        num_layers_per_stack=2, H_cycles=1, L_cycles=1, num_hidden_layers=4, max_position_embeddings=64,
    )  # fmt: skip
    weights = saved(HrmTextForCausalLM(config).eval(), tmp_path, SemiStructured(2, 4))
    pruned = PruningReport.from_dict(json.loads((tmp_path / "pruning.json").read_text())).linears
    assert (weights.pattern, weights.exceptions) == ("2:4", [])
    assert sum(x.shape[0] * x.shape[1] for x in weights.linears) == sum(row.shape[0] * row.shape[1] for row in pruned)
    assert {x.layer for x in weights.linears} == {0, 1, 2, 3}


def test_scales_of_quantised_weights_are_no_weights(tmp_path):
    def quantise(tensors):
        for name in [name for name in tensors if "proj" in name]:
            tensors[f"{name}_scale_inv"] = torch.ones(8, 8)

    saved(tiny_llama(), tmp_path, SemiStructured(2, 4))
    change(tmp_path, quantise)
    weights = inspect_model(str(tmp_path)).weights
    assert len(weights.linears) == 3 * 7
    assert weights.exceptions == []


def test_what_does_not_load_is_said(tmp_path, capsys):
    def break_it(tensors):
        tensors.pop("model.layers.0.self_attn.k_proj.weight")
        tensors["model.norm.weight"] = torch.ones(5)
        tensors["something.else"] = torch.ones(3)

    saved(tiny_llama(), tmp_path)
    change(tmp_path, break_it)
    weights = inspect_model(str(tmp_path)).weights
    assert weights.check.missing == ["model.layers.0.self_attn.k_proj.weight"]
    assert weights.check.mismatched == ["model.norm.weight (5,) for (32,)"]
    assert weights.check.unused == ["something.else"]
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 1
    assert "Does not load whole" in capsys.readouterr().out


def test_layers_of_other_names_are_not_said_to_be_dense(tmp_path):
    def rename(tensors):
        for name in [*tensors]:
            tensors[name.replace("layers", "blocks")] = tensors.pop(name)

    saved(tiny_llama(), tmp_path)
    change(tmp_path, rename)
    text = text_of(inspect_model(str(tmp_path)).weights)
    assert "None was found" in text
    assert "n:m pattern" not in text


def test_files_that_are_missing_or_cut_off(tmp_path):
    saved(tiny_llama(), tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{first.name} is cut off"):
        inspect_model(str(tmp_path))
    second.unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of the \d+ weight files.*{second.name}"):
        inspect_model(str(tmp_path))


def test_a_folder_without_weights_has_none(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    assert inspect_model(str(tmp_path)).weights is None


def test_the_report_of_the_run_is_read(tmp_path):
    saved(tiny_llama(), tmp_path / "model", SemiStructured(2, 4))
    (tmp_path / "model/pruning.json").rename(tmp_path / "pruning.json")  # where PruningTrainer puts it
    plain = json.loads((tmp_path / "pruning.json").read_text())
    plain["evaluations"] = {"dense": {"val/perplexity": 12.345}}
    (tmp_path / "pruning.json").write_text(json.dumps(plain))
    text = text_of(inspect_model(str(tmp_path / "model")).weights)
    assert "The report beside them says: Magnitude, 2:4, sparsity 0.5" in text
    assert "dense: val/perplexity 12.35" in text or "dense: val/perplexity 12.34" in text
    (tmp_path / "pruning.json").write_text("{}")
    assert inspect_model(str(tmp_path / "model")).weights.report is None


def test_the_model_card_is_read_where_there_is_no_report(tmp_path):
    from wanda_lightning.report.model_card import model_card
    from wanda_lightning.report.pruning_report import PruningReport

    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(model_card(PruningReport("Wanda()", "2:4", 0.5)))
    assert "The model card says: Wanda(), 2:4, sparsity 0.5." in text_of(inspect_model(str(tmp_path)).weights)
    for other in ("# Somebody's model", "", "---\n[unfinished\n---\n# Title", "---\ntags: [llama]\n---\n# Title\n"):
        (tmp_path / "README.md").write_text(other)
        assert inspect_model(str(tmp_path)).weights.card is None


@pytest.mark.parametrize(("size", "name"), [("1GB", "model"), ("20KB", "model-00001-of-00005")])
def test_weights_that_are_not_looked_at_are_named(tmp_path, caplog, size, name):
    tiny_llama(layers=1).save_pretrained(tmp_path / "model", max_shard_size=size)
    compress(str(tmp_path / "model"), str(tmp_path / "small"))
    assert inspect_model(str(tmp_path / "small")).weights is None
    assert f"not {name}.compressed.safetensors" in caplog.text


def test_only_one_tensor_is_in_memory(tmp_path, monkeypatch):
    """Nothing of the files is read to check whether they load, and matrices are dropped one by one."""
    saved(tiny_llama(), tmp_path)
    alive = []

    def measure(name, place, weight, patterns):
        import weakref

        assert sum(reference() is not None for reference in alive) <= 1, "an earlier matrix is still there"
        alive.append(weakref.ref(weight.untyped_storage()))
        return real(name, place, weight, patterns)

    from wanda_lightning.inspection import stored_weights as weights

    real = weights.measure
    monkeypatch.setattr(weights, "measure", measure)
    inspect_model(str(tmp_path))
    assert len(alive) == 21
