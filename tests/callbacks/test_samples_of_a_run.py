"""What the model says at each stage of a run."""

import json

import pytest
import torch
from helpers import SomebodysData, SomebodysModule, trainer
from transformers import AutoModelForCausalLM

from wanda_lightning import CausalLM, PruningReport, PruningTrainer, TextDataModule, WandaPruning
from wanda_lightning.evaluation.generation import PROMPTS, continue_prompts


def data():
    return TextDataModule(num_samples=4, sequence_length=16, max_evaluation_windows=2)


def test_each_stage_is_read_side_by_side(tiny_model_folder, tokenizer, tmp_path):
    """What the dense and the saved model say by themselves."""
    runner = trainer(tmp_path, WandaPruning(sparsity=0.6), cls=PruningTrainer)
    report = runner.prune(CausalLM(str(tiny_model_folder)), data())
    assert list(report.samples) == ["dense", "pruned"]
    for stage, folder in {"dense": tiny_model_folder, "pruned": tmp_path / "model"}.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert report.samples[stage] == continue_prompts(model, tokenizer)
    assert report.samples["dense"] != report.samples["pruned"]
    stored = json.loads((tmp_path / "pruning.json").read_text())
    assert PruningReport.from_dict(stored).samples == report.samples
    header = "| the model continues | dense | pruned |"
    assert header in (tmp_path / "model/README.md").read_text()
    assert header in (tmp_path / "pruning.md").read_text()


def test_own_prompts_and_training(tiny_model_folder, tmp_path):
    callback = WandaPruning(sparsity=0.5, prompts=["Zeros"])
    runner = trainer(tmp_path, callback, cls=PruningTrainer, num_sanity_val_steps=0)
    module = CausalLM(str(tiny_model_folder), optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    runner.prune(module, data(), save=False)
    runner.fit(module, datamodule=data())
    assert list(callback.report.samples) == ["dense", "pruned"]  # nothing while training
    runner.validate(module, datamodule=data(), verbose=False)
    assert list(callback.report.samples) == ["dense", "pruned", "fine-tuned"]
    assert {tuple(said) for said in callback.report.samples.values()} == {("Zeros",)}
    again = WandaPruning(sparsity=0.5)
    again.load_state_dict(callback.state_dict())
    assert again.report.samples == callback.report.samples


@pytest.mark.parametrize("prompts", [None, []])
def test_models_without_a_tokenizer_say_nothing(tmp_path, caplog, prompts):
    callback = WandaPruning(sparsity=0.5, prompts=prompts)
    runner = trainer(tmp_path, callback, cls=PruningTrainer)
    assert runner.prune(SomebodysModule(), SomebodysData()).samples == {}
    assert "says" not in caplog.text


def test_a_streamed_model_says_nothing(tiny_model_folder, tmp_path):
    """Its layers would be loaded for every token."""
    runner = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer)
    report = runner.prune(CausalLM(str(tiny_model_folder), stream=True), data(), save=False)
    assert list(report.evaluations) == ["dense", "pruned"]
    assert report.samples == {}


def test_a_model_that_cannot_continue_ends_no_run(tiny_model_folder, tmp_path, caplog):
    class Mute(CausalLM):
        def configure_model(self):
            super().configure_model()
            self.model.generate = lambda **_: {}["nothing"]

    callback = WandaPruning(sparsity=0.5)
    report = trainer(tmp_path, callback, cls=PruningTrainer).prune(Mute(str(tiny_model_folder)), data())
    assert report.samples == {}
    assert "it cannot continue a text (KeyError('nothing'))" in caplog.text


def test_prompts_are_checked_at_once():
    with pytest.raises(ValueError, match="prompts must be a list of texts"):
        WandaPruning(prompts=PROMPTS[0])
