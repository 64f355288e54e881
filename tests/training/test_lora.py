"""Adapters on a pruned model: what trains, what is saved, and what a merge must not do."""

import copy
import json
import sys

import helpers
import pytest
import torch
from helpers import loader, tiny_llama, tiny_mixtral, token_batches
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from wanda_lightning.callbacks import SparseGPTPruning, WandaPruning
from wanda_lightning.checkpoints.loading import load_model
from wanda_lightning.checkpoints.saving import save_pretrained
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Magnitude, Wanda
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.runs.causal_lm import CausalLM
from wanda_lightning.runs.trainer import PruningTrainer
from wanda_lightning.sparsity import Unstructured
from wanda_lightning.training.lora import LoraSettings, add_adapters, has_adapters, merge_masked, without_adapters


class Data(LightningDataModule):
    def calibration_dataloader(self):
        return loader()

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(masked=True)


def adapted(merge: str = "none", folder=None, **settings) -> CausalLM:
    return CausalLM(
        str(folder),
        lora=LoraSettings(target_modules=["q_proj", "v_proj", "down_proj"], merge=merge, **settings),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1),
    )


def trainer(tmp_path, *callbacks, **settings):
    settings = {"max_steps": 4, "num_sanity_val_steps": 0} | settings
    return helpers.trainer(tmp_path, *callbacks, cls=PruningTrainer, **settings)


def finetuned(tmp_path, folder, merge: str = "none", callback=None):
    """Prune, evaluate, train adapters, evaluate, as the command line does."""
    module, run = adapted(merge, folder), trainer(tmp_path, callback or WandaPruning(sparsity=0.5))
    run.prune(module, Data(), save=False)
    run.fit(module, datamodule=Data())
    run.validate(module, datamodule=Data(), verbose=False)
    return module, run


def frozen(model) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize("callback", [WandaPruning, SparseGPTPruning])
def test_the_base_is_pruned_as_without_adapters_and_stays_so_while_they_train(tmp_path, tiny_model_folder, callback):
    pruning = callback(sparsity=0.5)
    module, _ = finetuned(tmp_path, tiny_model_folder, callback=pruning)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    prune_model(expected, list(loader()), pruning.method, Unstructured(0.5))
    got = frozen(module.model)
    assert got.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.named_parameters())
    assert {row.name for row in pruning.report.linears} == {
        linear.name for layer in decoder_layers(expected) for linear in layer.linears
    }
    assert all(p.any() for name, p in module.model.named_parameters() if "lora_B" in name)  # they start at zero
    zeros = sum((weight == 0).sum().item() for weight in expected.parameters())
    assert pruning.report.whole_model_sparsity == pytest.approx(zeros / expected.num_parameters())


def test_defaults_are_the_reference_set_up(tiny_model_folder):
    module = CausalLM(str(tiny_model_folder), lora=LoraSettings())
    module.configure_model()
    (config,) = module.model.peft_config.values()
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 16, {"q_proj", "v_proj"})
    trained = [name for name, p in module.model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 2 * 2
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)


def test_dropout_is_that_of_the_settings():
    model = tiny_llama()
    add_adapters(model, LoraSettings(dropout=0.25))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


def test_masked_merge_is_its_formula():
    model = tiny_llama()
    prune_model(model, token_batches(), Wanda(), Unstructured(0.6))
    pruned = copy.deepcopy(model)
    add_adapters(model, LoraSettings(rank=4, alpha=6, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(0)
    adapters = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            adapters[name] = parameter.detach().clone()
    merge_masked(model)
    assert not has_adapters(model)
    for name, weight in pruned.named_parameters():
        expected = weight
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            a, b = (adapters[name.replace("weight", f"lora_{x}.default.weight")] for x in "AB")
            expected = (weight + 6 / 4 * b @ a) * (weight != 0)
            assert not torch.equal(expected, weight)
        torch.testing.assert_close(model.get_parameter(name), expected)
        assert torch.equal(model.get_parameter(name) == 0, expected == 0)
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_of_fused_experts_are_merged_under_their_masks():
    from peft import LoraConfig, get_peft_model

    model = tiny_mixtral()
    prune_model(model, token_batches(), Wanda(), Unstructured(0.5))
    pruned, both = copy.deepcopy(model), ["gate_up_proj", "down_proj"]
    get_peft_model(model, LoraConfig(r=2, target_parameters=[f"mlp.experts.{name}" for name in both]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    outer = model.model.layers[0].mlp.experts  # around one parameter; within it is what is around the other
    changes = {each.parameter_name: each.get_delta_weight("default") for each in (outer, outer.base_layer)}
    merge_masked(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in pruned.named_parameters()]
    for name in both:
        was, now = (getattr(each.model.layers[0].mlp.experts, name) for each in (pruned, model))
        torch.testing.assert_close(now, (was + changes[name]) * (was != 0))


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
@pytest.mark.parametrize("merge", [False, True])
def test_what_was_trained_beside_adapters_is_saved_under_its_name(tmp_path, beside, merge):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = tiny_llama(layers=2)
    prune_model(model, token_batches(), Wanda(), Unstructured(0.5))
    tuned, ids = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **beside)), token_batches()[0]
    tuned(ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0).step()
    with torch.no_grad():
        expected = tuned.eval()(ids).logits
    if merge:
        merge_masked(model)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
    else:
        tuned.save_pretrained(tmp_path / "adapter")
        with without_adapters(tuned) as base:
            base.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits if merge else expected)


def test_a_merged_model_is_an_ordinary_one(tmp_path):
    """It is saved whole by its own method, and may get adapters again."""
    model = tiny_llama(layers=1)
    add_adapters(model, LoraSettings())
    merge_masked(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
    add_adapters(model, LoraSettings(rank=2))
    assert has_adapters(model)


def test_the_adapter_is_saved_alone_beside_the_pruned_model(tmp_path, tiny_model_folder):
    from peft import PeftModel

    module, run = finetuned(tmp_path, tiny_model_folder)
    run.save_pretrained(module)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = frozen(module.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in base.named_parameters())
    assert {(m.weight == 0).float().mean().item() for m in base.model.modules() if isinstance(m, torch.nn.Linear)} == {
        0.5
    }
    ids = token_batches()[0]
    with torch.no_grad():
        logits = module.model.eval()(ids).logits
        assert not torch.allclose(base.eval()(ids).logits, logits)
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits, logits)
        # From the adapter alone: it knows the pruned model as its base, not the dense one.
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(again(ids).logits, logits)
    assert has_adapters(module.model)  # the module is as it was
    report = json.loads((tmp_path / "pruning.json").read_text())
    assert list(report["evaluations"]) == ["dense", "pruned", "fine-tuned"]


def test_an_adapter_goes_with_the_model_that_it_was_on_top_of(tmp_path, tiny_model_folder, capfd):
    module, run = finetuned(tmp_path, tiny_model_folder)
    run.save_pretrained(module)
    assert {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()} == {
        file.stat().st_mode for file in (tmp_path / "model").iterdir()
    }
    merge_masked(module.model)
    run.save_pretrained(module)
    assert not (tmp_path / "adapter").exists()
    assert "Writing" not in capfd.readouterr().err  # no bars of transformers


def test_it_is_said_that_an_adapter_is_not_loaded(tmp_path, tiny_model_folder, caplog):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "model").symlink_to(tiny_model_folder)
    load_model(tmp_path / "model")
    assert not caplog.text
    load_model(tmp_path)
    assert f"is loaded without {tmp_path / 'adapter'}, which peft.PeftModel" in caplog.text


def test_a_masked_merge_is_saved_as_one_model_and_both_are_evaluated(tmp_path, tiny_model_folder):
    module, run = finetuned(tmp_path, tiny_model_folder, merge="masked")
    weights = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    run.save_pretrained(module)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    name = "model.layers.1.mlp.down_proj"
    w = weights[f"{name}.base_layer.weight"]
    a, b = (weights[f"{name}.lora_{x}.default.weight"] for x in "AB")
    torch.testing.assert_close(saved.get_parameter(f"{name}.weight"), (w + 2 * b @ a) * (w != 0))
    assert not (tmp_path / "adapter").exists()
    report = json.loads((tmp_path / "pruning.json").read_text())
    for row in report["linears"]:
        assert (saved.get_parameter(f"{row['name']}.weight") == 0).float().mean() == 0.5
    assert list(report["evaluations"]) == ["dense", "pruned", "fine-tuned", "merged"]
    perplexities = [stage["val/perplexity"] for stage in report["evaluations"].values()]
    assert len(set(perplexities)) == 4
    # The figure of the merged model is that of the saved one.
    (alone,) = trainer(tmp_path / "alone").validate(CausalLM(str(tmp_path / "model")), datamodule=Data(), verbose=False)
    assert alone["val/perplexity"] == pytest.approx(perplexities[-1], rel=1e-5)
    assert report["evaluations"]["merged"]["sparsity"] == pytest.approx(0.5)


def test_a_merge_that_would_densify_is_refused(tmp_path, tiny_model_folder):
    with pytest.raises(ValueError, match=r"none \(the adapter is saved alone\) or masked .* would fill the zeros"):
        LoraSettings(merge="plain")
    module, run = finetuned(tmp_path, tiny_model_folder)
    with pytest.raises(ValueError, match=r"the model has adapters.*PruningTrainer\.save_pretrained, or merge under"):
        save_pretrained(module.model, None, tmp_path / "model")
    for layer in module.model.modules():
        if "base_layer" in layer._modules:
            layer.merge()  # behind our back
    with pytest.raises(RuntimeError, match=r"no longer zero .*merge='masked'.*or save the adapter alone"):
        run.save_pretrained(module)
    with (
        pytest.raises(ValueError, match=r"unmerge them.*merge='none'.*merge='masked'"),
        without_adapters(module.model),
    ):
        pass
    with pytest.raises(ValueError, match="filled their zeros"):
        merge_masked(module.model)
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_resumes_with_its_adapter(tmp_path, tiny_model_folder):
    def run(epochs, ckpt_path=None):
        torch.manual_seed(0)
        module = adapted(folder=tiny_model_folder, dropout=0.0)
        callbacks = [WandaPruning(sparsity=0.5), ModelCheckpoint(tmp_path, filename=f"{epochs}")]
        settings = {"max_steps": -1, "max_epochs": epochs, "enable_checkpointing": True}
        trainer(tmp_path, *callbacks, **settings).fit(module, datamodule=Data(), ckpt_path=ckpt_path)
        return module

    whole, _ = run(2), run(1)
    resumed = run(2, tmp_path / "1.ckpt")
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_with_adapters_says_that_it_needs_them(tmp_path, tiny_model_folder, strict):
    module, run = CausalLM(str(tiny_model_folder), lora=LoraSettings()), trainer(tmp_path, WandaPruning(sparsity=0.5))
    run.fit(module, datamodule=Data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="the checkpoint has adapters, and the model has none: give lora"):
        CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", strict=strict)


def test_gradient_checkpointing_reaches_the_adapters(tmp_path, tiny_model_folder):
    module = CausalLM(str(tiny_model_folder), lora=LoraSettings(), gradient_checkpointing=True)
    trainer(tmp_path, WandaPruning(sparsity=0.5)).fit(module, datamodule=Data())
    assert all(p.any() for name, p in module.model.named_parameters() if "lora_B" in name)


def test_somebodys_own_peft_model_is_pruned_and_saved(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    class SomebodysModule(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = get_peft_model(tiny_llama(vocab_size=257), LoraConfig(target_modules=["q_proj"]))

        def training_step(self, batch, batch_idx):
            return self.net(**batch, labels=batch["input_ids"]).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), lr=0.02)

    module, run = SomebodysModule(), trainer(tmp_path, WandaPruning(sparsity=0.5))
    run.fit(module, loader())
    run.save_pretrained(module)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (base.model.layers[0].self_attn.q_proj.weight == 0).float().mean() == 0.5
    ids = token_batches()[0]
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
        torch.testing.assert_close(loaded, module.net.eval()(ids).logits)


def test_names_that_match_nothing_are_refused(tiny_model_folder):
    with pytest.raises(ValueError, match="query_key_value"):
        CausalLM(str(tiny_model_folder), lora=LoraSettings(target_modules=["query_key_value"])).configure_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be"),
        ({"alpha": 0}, "alpha must be a finite number above 0, got 0"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"target_modules": "q_proj"}, "target_modules must be a list of names .* got 'q_proj'"),
        ({"target_modules": []}, "target_modules must be a list of names"),
        ({"dropout": "5%"}, r"dropout must be a number in \[0, 1\), got '5%'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


def test_without_peft_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'pip install "wanda-lightning\[lora\]"'):
        add_adapters(tiny_llama(layers=1), LoraSettings())


def test_adapters_are_out_of_the_way_for_a_while_only():
    model = tiny_llama(layers=1)
    prune_model(model, None, Magnitude(), Unstructured(0.5))
    names = list(dict(model.named_parameters()))
    add_adapters(model, LoraSettings())
    with without_adapters(model) as plain:
        assert list(dict(plain.named_parameters())) == names
        assert not has_adapters(plain)
    assert has_adapters(model)
    assert model._hf_peft_config_loaded
