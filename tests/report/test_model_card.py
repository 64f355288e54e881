"""The model card that lies beside a saved model."""

import re

import pytest
import torch
from helpers import few_windows as data
from helpers import pruning_trainer
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from wanda_lightning import CausalLM, PruningTrainer, WandaPruning
from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.report.model_card import model_card
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.training.lora import LoraSettings


def trainer_of(folder, callback, steps: int = 0) -> PruningTrainer:
    return pruning_trainer(folder, callback, max_steps=steps or -1, max_epochs=1, num_sanity_val_steps=0)


def test_the_card_says_what_was_done(tiny_model_folder, tmp_path):
    (tmp_path / "secret").mkdir()
    text = tmp_path / "secret/my_text.txt"
    text.write_text("Some words, and some more of them. " * 400)
    trainer = trainer_of(tmp_path, WandaPruning(pattern="2:4", targets=["mlp.*"]))
    report = trainer.prune(CausalLM(str(tiny_model_folder)), data(source=str(text)))
    card = (tmp_path / "model/README.md").read_text()
    for fact in (
        "# Wanda, 2:4, sparsity 0.5",
        f"Made from `{tiny_model_folder.name}`",
        "50.00% of the weights of 9 linears are zero",
        "| evaluation | dense | pruned |",
        f"{report.evaluations['pruned']['val/perplexity']:.4g} |",
        r"| mlp.\* | 9 |",
        "| no target | 12 |",
        "| source | my_text.txt |",
        "| sequence_length | 16 |",
    ):
        assert fact in card
    assert "steps" not in card
    assert str(tmp_path) not in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("base", "known"), [("some-one/Model-1.5B", True), ("model.gguf", False), ("a/b/c", False), (None, False)]
)
def test_the_hub_reads_the_header(base, known):
    """huggingface_hub reads it back; a base model is only named where it has a name on the hub."""
    data = ModelCard(model_card(PruningReport("Wanda()", "2:4", 0.5), base)).data.to_dict()
    assert data == {
        **({"base_model": base} if known else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "sparse"],
    }


def test_a_local_folder_that_looks_like_a_hub_name_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/model").mkdir(parents=True)
    card = model_card(PruningReport("Wanda()", "2:4", 0.5), "results/model")
    assert "base_model" not in card
    assert "Made from `model`" in card


def test_folders_within_the_home_folder_are_private_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "client").mkdir()
    (tmp_path / "client/mail.txt").touch()
    card = model_card(PruningReport("Wanda()", "2:4", 0.5, calibration={"source": "~/client/mail.txt"}), "~/client")
    assert "| source | mail.txt |" in card
    assert "Made from `client`" in card


def finetuned(tmp_path, folder, callback=None, **settings) -> tuple[str, CausalLM]:
    """Prune, evaluate, train two steps, evaluate and save, as the command line does; returns card and module."""
    trainer = trainer_of(tmp_path, callback or WandaPruning(sparsity=0.5), steps=2)
    module = CausalLM(str(folder), optimizer=lambda params: torch.optim.SGD(params, lr=0.05), **settings)
    datamodule = data()
    trainer.prune(module, datamodule, save=False)
    trainer.fit(module, datamodule=datamodule)
    trainer.validate(module, datamodule=datamodule, verbose=False)
    trainer.save_pretrained(module)
    return (tmp_path / "model/README.md").read_text(), module


def test_fine_tuned(tiny_model_folder, tmp_path):
    card, _ = finetuned(tmp_path, tiny_model_folder)
    assert "fine-tuned for 2 steps; the zeros stayed zero" in card
    assert "| evaluation | dense | pruned | fine-tuned |" in card


def test_pruned_little_by_little(tiny_model_folder, tmp_path):
    callback = WandaPruning(sparsity=0.5, schedule=Gradual(start=0, end=2, every=1))
    card, _ = finetuned(tmp_path, tiny_model_folder, callback)
    assert "pruned little by little while it was fine-tuned, for 2 steps" in card
    assert "50.00% of the weights of 21 linears are zero" in card


@pytest.mark.parametrize("merge", ["none", "masked"])
def test_adapters(tiny_model_folder, tmp_path, merge):
    """What the card says of the figures is so: the model's own perplexity is in the column that it names."""
    lora = LoraSettings(rank=4, alpha=64, dropout=0.0, target_modules=["q_proj", "down_proj"], merge=merge)
    card, _ = finetuned(tmp_path, tiny_model_folder, lora=lora)
    header = next(line for line in card.splitlines() if line.startswith("| evaluation"))
    row = next(line for line in card.splitlines() if line.startswith("| val/perplexity"))
    figures = dict(zip(re.findall(r"[\w-]+", header), row.strip("| ").split(" | "), strict=True))
    if merge == "masked":
        assert "merged into the weights that are not zero" in card
        own = "merged"
    else:
        assert "are not part of this model but lie in `adapter/`" in card
        assert (tmp_path / "adapter/adapter_config.json").exists()
        own = "pruned"
    (again,) = trainer_of(tmp_path / "again", WandaPruning()).validate(
        CausalLM(str(tmp_path / "model")), datamodule=data(), verbose=False
    )
    assert f"{again['val/perplexity']:.4g}" == figures[own]
    assert figures["fine-tuned"] != figures[own]


def test_zeros_that_were_found_took_no_time(tiny_model_folder, tmp_path):
    trainer_of(tmp_path / "first", WandaPruning(sparsity=0.5)).prune(CausalLM(str(tiny_model_folder)), data())
    pruned = CausalLM(str(tmp_path / "first/model"))
    trainer_of(tmp_path / "second", WandaPruning(sparsity=0.5)).prune(pruned, data())
    card = (tmp_path / "second/model/README.md").read_text()
    assert "# already pruned, not by this run's Wanda" in card
    assert "pruned in" not in card
    assert "| evaluation | as loaded | pruned |" in card
