import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from helpers import tiny_llama, tiny_mixtral
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model

from wanda_lightning.checkpoints import saving
from wanda_lightning.checkpoints.folders import check_place, place_for
from wanda_lightning.checkpoints.loading import load_model, load_streamed, load_tokenizer
from wanda_lightning.checkpoints.saving import save_pretrained, save_weights
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.inspection.inspect_model import inspect_model
from wanda_lightning.methods import Wanda
from wanda_lightning.sparsity import Unstructured
from wanda_lightning.training.lora import LoraSettings, add_adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_saved_model_gives_the_same_logits(batches, tokenizer, tmp_path, dtype, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    for parameter in model.parameters():  # not model.to(): rotary frequencies stay float32, as from_pretrained has them
        parameter.data = parameter.data.to(dtype)
    prune_model(model, batches, Wanda(), Unstructured(0.5))
    folder = save_pretrained(model, tokenizer, tmp_path / "results" / "model")
    loaded = load_model(str(folder))
    assert loaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]).logits, model(batches[0]).logits)
    assert load_tokenizer(str(folder))("some text").input_ids == tokenizer("some text").input_ids
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "sparsity_config" not in config
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {folder.stat().st_mode & 0o666}
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_named_or_given(tmp_path, llama, dtype):
    llama.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype).dtype == torch.bfloat16


@pytest.mark.parametrize("written", [str, Path])
def test_the_folder_of_a_run_stands_for_its_model(tmp_path, llama, tokenizer, written):
    save_pretrained(llama, tokenizer, tmp_path / "run/model")
    run = written(tmp_path / "run")
    assert torch.equal(load_model(run).lm_head.weight, llama.lm_head.weight)
    assert load_tokenizer(run)("some text").input_ids == tokenizer("some text").input_ids


def test_what_is_no_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'bf16'"):
        load_model("./nothing", "bf16")


def test_an_older_model_is_replaced_whole(tmp_path, llama):
    save_pretrained(tiny_llama(layers=1), None, tmp_path / "model")
    save_pretrained(llama, None, tmp_path / "model")
    assert load_model(str(tmp_path / "model")).config.num_hidden_layers == 3
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("save", [lambda model, folder: save_pretrained(model, None, folder), save_weights])
@pytest.mark.parametrize("named", ["thesis", "thesis/chapter.tex"])
def test_what_is_no_model_is_not_replaced(tmp_path, llama, save, named):
    file = tmp_path / "thesis/chapter.tex"
    file.parent.mkdir()
    file.write_text("a year of work")
    with pytest.raises(ValueError, match="holds no model, and would be replaced as a whole: name a new folder"):
        save(llama, tmp_path / named)
    assert file.read_text() == "a year of work"


@pytest.mark.parametrize("save", [lambda model, folder: save_pretrained(model, None, folder), save_weights])
def test_what_lies_beside_a_model_is_not_deleted(tmp_path, llama, save):
    """Such as the checkpoints in the output folder of Hugging Face's Trainer."""
    save_pretrained(llama, None, tmp_path)
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "losses.csv").write_text("a week of training")
    with pytest.raises(ValueError, match=r"holds checkpoint-500, losses\.csv beside a model, and would be replaced"):
        save(llama, tmp_path)
    assert {"checkpoint-500", "losses.csv"} < {path.name for path in tmp_path.iterdir()}


def test_an_older_model_in_other_files_is_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    assert place_for(tmp_path) == tmp_path


def test_the_weights_of_any_module_take_the_place_of_older_ones(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = torch.nn.Linear(2, 2)
        save_weights(module, tmp_path / "model")
    assert torch.equal(load_file(tmp_path / "model" / "model.safetensors")["weight"], module.weight)


def test_the_config_of_another_program_makes_no_model(tmp_path, llama):
    (tmp_path / "config.json").write_text('{"learning_rate": 0.1}')
    (tmp_path / "train.py").write_text("a year of work")
    with pytest.raises(ValueError, match="holds no model, and would be replaced"):
        save_pretrained(llama, None, tmp_path)
    assert (tmp_path / "train.py").exists()


def test_all_that_a_tokenizer_saves_is_part_of_a_model(tmp_path, llama, tokenizer):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    for _ in range(2):
        save_pretrained(llama, tokenizer, tmp_path / "model")
    assert (tmp_path / "model/additional_chat_templates/tools.jinja").is_file()


def test_the_clone_of_a_repository_is_not_replaced(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    (tmp_path / ".git").mkdir()
    with pytest.raises(ValueError, match="holds a git repository, and would be replaced"):
        save_pretrained(llama, None, tmp_path)
    assert (tmp_path / ".git").exists()


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_what_is_saved_is_the_model_in_a_wrapper(tmp_path, llama, wrap):
    save_pretrained(wrap(llama), None, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model").lm_head.weight, llama.lm_head.weight)


def test_a_name_is_no_model_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, .* got 'me/model'"):
        save_pretrained("me/model", None, tmp_path / "model")


def test_a_weight_may_have_changed_its_place_among_others(tmp_path):
    """As torch.nn.utils.prune leaves it: behind the bias, in front of which transformers builds it."""
    model = tiny_llama(attention_bias=True)
    query = model.model.layers[1].self_attn.q_proj
    torch.nn.utils.prune.l1_unstructured(query, "weight", 0.5)
    torch.nn.utils.prune.remove(query, "weight")
    save_pretrained(model, None, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model").model.layers[1].self_attn.q_proj.weight, query.weight)


def test_a_failed_save_leaves_the_older_model(tmp_path, llama, monkeypatch):
    save_pretrained(tiny_llama(layers=1), None, tmp_path / "model")

    def full(folder, **_):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(llama, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(llama, None, tmp_path / "model")
    assert load_model(str(tmp_path / "model")).config.num_hidden_layers == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_that_does_not_read_back_is_an_error(tmp_path, llama, monkeypatch):
    other = tiny_llama(seed=7)
    monkeypatch.setattr(llama, "save_pretrained", other.save_pretrained)
    with pytest.raises(RuntimeError, match="does not load as it was"):
        save_pretrained(llama, None, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0.5, torch.nan])
def test_weights_that_do_not_read_back_are_an_error(tmp_path, monkeypatch, value):
    module, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    other.load_state_dict(module.state_dict())
    torch.nn.init.constant_(other.bias, value)
    monkeypatch.setattr(saving, "save_model", lambda _, file: save_model(other, file))
    with pytest.raises(RuntimeError, match=r"saved weights are not those of the model: bias differs"):
        save_weights(module, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_is_no_tensor_is_refused_before_it_is_saved(tmp_path):
    class WithState(torch.nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

    with pytest.raises(ValueError, match="WithState cannot be saved as safetensors: _extra_state is no tensor"):
        save_weights(WithState(4, 4), tmp_path / "model")


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(tmp_path, llama):
    add_adapters(llama, LoraSettings())
    with pytest.raises(ValueError, match="the model has adapters, and merging them would fill the zeros"):
        save_pretrained(llama, None, tmp_path / "model")


@pytest.mark.parametrize("named", ["model.gguf", "model"])
def test_what_is_there_is_not_refused(tmp_path, llama, named):
    (tmp_path / "model.gguf").touch()
    llama.save_pretrained(tmp_path / "model")
    check_place(tmp_path / named)


@pytest.mark.parametrize("load", [load_model, load_streamed, load_tokenizer, inspect_model])
def test_a_model_is_no_name_of_one(llama, load):
    with pytest.raises(ValueError, match="a model's name or folder is needed, got a LlamaForCausalLM"):
        load(llama)


@pytest.mark.parametrize(("name", "value"), [("dtype", "zork"), ("quantization_config", "zork")])
@pytest.mark.parametrize("load", [load_model, load_streamed, inspect_model])
def test_a_config_of_nonsense_is_named(tmp_path, llama, load, name, value):
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=f"config of '{tmp_path}'"):
        load(tmp_path)


def test_missing_models_are_explained(tmp_path):
    with pytest.raises(ValueError, match="no such GGUF file"):
        load_model(str(tmp_path / "model.gguf"))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*could not be had from the hub"):
        load_tokenizer("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"cannot load the model of .*: Error no file named model\.safetensors"):
        load_model(str(tmp_path))


def test_the_file_that_was_cut_off_is_named(tmp_path, llama):
    llama.save_pretrained(tmp_path, max_shard_size="40KB")
    file = tmp_path / "model-00003-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model-00003-of-00005\.safetensors is cut off"):
        load_model(tmp_path)


@pytest.mark.parametrize("load", [load_model, load_streamed])
def test_a_model_without_all_of_its_weights_is_refused(tmp_path, llama, load):
    """The rest would be drawn at random, and pruned."""
    llama.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .* random: model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path)


@pytest.mark.parametrize("load", [load_model, load_streamed])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"intermediate_size": 96}, r"9 weights .*: .*\.0\.mlp\.down_proj\.weight is \(32, 64\) .* \(32, 96\)"),
        ({"vocab_size": 320}, r"2 weights .*: lm_head\.weight is \(300, 32\) .* \(320, 32\) by its config"),
    ],
)
def test_a_config_that_is_not_of_the_weights_is_refused(tmp_path, llama, load, setting, said):
    """Of layers that stay on disk it was not seen, and they were pruned in the shapes of the files."""
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | setting
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        load(tmp_path)


def test_a_disk_without_room_for_experts_is_named(tmp_path, monkeypatch):
    """They are stored one by one, and written once more as the model has them."""

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    tiny_mixtral().save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.integrations.accelerate.save_file", full)
    with pytest.raises(OSError, match=r"once more to .*streamed.*: .* No space left .*HF_ASSETS_CACHE"):
        load_streamed(tmp_path)


def test_a_weight_that_is_not_a_number_is_saved_as_it_is(tmp_path):
    """It was left out of the pruning, which refuses it; saving is no place to complain of it."""
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    save_pretrained(model, None, tmp_path / "model")
    saved = load_model(str(tmp_path / "model")).model.layers[0].mlp.up_proj.weight
    assert saved.isnan().sum() == 1
