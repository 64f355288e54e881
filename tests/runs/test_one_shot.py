"""``PruningTrainer.prune`` with the dataloaders that ``fit`` takes."""

import copy

import pytest
import torch
from helpers import (
    SomebodysData,
    SomebodysModule,
    batches,
    digests,
    few_windows,
    pruning_trainer,
    sparsities,
    tiny_llama,
    trainer,
)

from wanda_lightning import (
    CausalLM,
    DepthPruning,
    Gradual,
    PruningTrainer,
    Wanda,
    WandaPruning,
    WidthPruning,
    prune_model,
)


@pytest.mark.parametrize("evaluated", [True, False])
def test_prune_takes_dataloaders(tmp_path, evaluated):
    module = SomebodysModule()
    plain = copy.deepcopy(module.net)
    loaders = {"train_dataloaders": batches(), **({"val_dataloaders": batches(seed=2)} if evaluated else {})}
    callback = WandaPruning(sparsity=0.5, num_samples=8)
    report = trainer(tmp_path, callback, cls=PruningTrainer).prune(module, **loaders)
    assert sparsities(module) == {0.5}
    assert report.calibration["source"] == "train dataloader"
    assert report.calibration["sequences"] == 8
    assert [*report.evaluations] == (["dense", "pruned"] if evaluated else [])
    assert (tmp_path / "model").is_dir()
    prune_model(plain, list(batches()), Wanda(), 0.5)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, module.net.state_dict()[name]), name


def test_what_is_evaluated_without_training(tmp_path):
    """The dense loss is that of the module before, the pruned one that of the module after."""
    module, held_out = SomebodysModule(), batches(seed=2)

    def loss():
        with torch.no_grad():
            losses = [module.net(input_ids=batch, labels=batch).loss.item() for batch in held_out]
        return sum(losses) / len(losses)

    dense = loss()
    pruning = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer)
    report = pruning.prune(module, train_dataloaders=batches(), val_dataloaders=held_out, save=False)
    assert report.evaluations["dense"]["val_loss"] == pytest.approx(dense, rel=1e-5)
    assert report.evaluations["pruned"]["val_loss"] == pytest.approx(loss(), rel=1e-5)


def test_a_loader_in_the_place_of_the_datamodule_is_refused(tmp_path):
    module = SomebodysModule()
    with pytest.raises(ValueError, match="got DataLoader: prune takes dataloaders by name, as train_dataloaders"):
        trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer).prune(module, batches())
    assert sparsities(module) == {0.0}


def test_a_model_in_the_place_of_the_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model must be a LightningModule, such as .* got a LlamaForCausalLM"):
        pruning_trainer(tmp_path, WandaPruning()).prune(tiny_llama())


def test_other_processes_hear_of_a_model_that_cannot_be_written(tmp_path, told, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanda_lightning.checkpoints.saving.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path, cls=PruningTrainer).save_pretrained(SomebodysModule())
    assert isinstance(told[-1], OSError)


@pytest.mark.parametrize(
    ("asked", "save", "message"),
    [
        ({"targets": ["nosuch"]}, True, "'nosuch' matches no linear"),
        ({"ignore": ["nosuch"]}, True, "'nosuch' matches no linear"),
        ({"allocation": {"nosuch": 0.3}}, True, "'nosuch' matches no linear"),
        (
            {"sparsity": None, "pattern": "2:3"},
            True,
            "q_proj has 32 input features, which do not divide into groups of 3",
        ),
        ({"allocation": {"o_proj": "1:5"}}, True, "o_proj has 32 input features, which do not divide into groups of 5"),
        ({"schedule": Gradual(0, 4)}, False, "schedule ends at step 4, training at step 3"),
        ({"schedule": Gradual(0, 3)}, True, "a gradual schedule prunes while a model trains"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_evaluation(tmp_path, monkeypatch, asked, save, message):
    monkeypatch.setattr(SomebodysModule, "validation_step", lambda *_: pytest.fail("it was evaluated"))
    pruning = trainer(tmp_path, WandaPruning(**{"sparsity": 0.5} | asked), cls=PruningTrainer, max_epochs=-1)
    with pytest.raises(ValueError, match=message):
        pruning.prune(SomebodysModule(), train_dataloaders=batches(), val_dataloaders=batches(), save=save)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (DepthPruning(layers=2), "layers=2 of 2 decoder layers leaves none"),
        (WidthPruning(keep=0.5, attention_keep=0.1), "attention_keep=0.1 of 2 key/value groups leaves none"),
    ],
)
def test_shapes_that_cannot_be_are_refused_before_the_evaluation(tmp_path, monkeypatch, callback, message):
    monkeypatch.setattr(SomebodysModule, "validation_step", lambda *_: pytest.fail("it was evaluated"))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback, cls=PruningTrainer).prune(
            SomebodysModule(), train_dataloaders=batches(), val_dataloaders=batches()
        )


def test_a_fast_dev_run_may_be_shorter_than_a_schedule(tmp_path):
    run = pruning_trainer(tmp_path, WandaPruning(sparsity=0.5, schedule=Gradual(0, 4)), fast_dev_run=True)
    assert run.prune(SomebodysModule(), SomebodysData(), save=False).linears == []  # fit will prune


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_spawn"])
def test_processes_that_end_before_the_model_is_saved_are_refused(tmp_path, strategy):
    run = pruning_trainer(tmp_path, WandaPruning(sparsity=0.5), devices=2, strategy=strategy)
    with pytest.raises(ValueError, match='in processes that end before it is saved: use strategy="ddp"'):
        run.prune(SomebodysModule(), SomebodysData())
    assert [*tmp_path.iterdir()] == []


def test_a_model_that_is_not_loaded_replaces_none(tmp_path, tiny_model_folder):
    pruning_trainer(tmp_path, WandaPruning(sparsity=0.5)).prune(CausalLM(tiny_model_folder), few_windows())
    before = digests(tmp_path / "model")
    with pytest.raises(ValueError, match="CausalLM has no weights to save"):
        pruning_trainer(tmp_path, WandaPruning(sparsity=0.5)).save_pretrained(CausalLM(tiny_model_folder))
    assert digests(tmp_path / "model") == before


@pytest.mark.parametrize("callback", [WandaPruning(0.5), WidthPruning(0.5)])
def test_a_model_of_no_run_is_not_replaced(tmp_path, callback):
    """Such as the dense one, where the results go to the folder that it lies in."""
    tiny_llama().save_pretrained(tmp_path / "model")
    before = digests(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model, and no report of the run that made it lies beside it"):
        trainer(tmp_path, callback, cls=PruningTrainer).prune(SomebodysModule(), train_dataloaders=batches())
    assert digests(tmp_path / "model") == before


def test_what_a_model_cannot_take_the_place_of_is_known_before_it_is_pruned(tmp_path):
    module = SomebodysModule()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/thesis.tex").write_text("a year of work")
    with pytest.raises(ValueError, match="holds no model, and would be replaced as a whole"):
        trainer(tmp_path, WandaPruning(0.5, overwrite=True), cls=PruningTrainer).prune(
            module, train_dataloaders=batches()
        )
    assert sparsities(module) == {0.0}


def test_a_model_of_no_run_is_replaced_if_that_is_asked_for(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    asked = WandaPruning(0.5, overwrite=True)
    trainer(tmp_path, asked, cls=PruningTrainer).prune(SomebodysModule(), train_dataloaders=batches())
    assert "pruning.json" in {file.name for file in tmp_path.iterdir()}


def test_results_go_to_a_folder_within_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = WandaPruning(0.5, output_dir="~/results")
    trainer(tmp_path, asked, cls=PruningTrainer).prune(SomebodysModule(), train_dataloaders=batches())
    assert (tmp_path / "results/pruning.json").is_file()
