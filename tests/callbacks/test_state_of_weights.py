"""What is known of weights belongs to the weights: one callback, several models, several settings."""

import json

import pytest
import torch
from helpers import SomebodysData, SomebodysModule, batches, sparsities, tiny_llama, token_batches, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.callbacks import MagnitudePruning, SparseGPTPruning, WandaPruning
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Magnitude
from wanda_lightning.model.language_model import find_language_model
from wanda_lightning.runs.trainer import PruningTrainer
from wanda_lightning.sparsity import Unstructured

LONG = {"max_steps": 10, "max_epochs": -1}
MLP = ["gate_proj", "up_proj", "down_proj"]


def module(seed: int = 0) -> SomebodysModule:
    module = SomebodysModule()
    module.net = tiny_llama(layers=2, seed=seed)
    return module


def zeros(module, part: str = "_proj") -> float:
    weights = [p for name, p in module.net.named_parameters() if part in name]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("settings", [{}, {"schedule": Gradual(0, 4, 2)}, {"schedule": Gradual(0, 4, 2, regrow=True)}])
def test_a_second_model_is_pruned_as_the_first_was(tmp_path, settings):
    callback, second = WandaPruning(sparsity=0.5, **settings), module(1)
    trainer(tmp_path, callback, **LONG).fit(module(0), SomebodysData())
    first = callback.report
    trainer(tmp_path, callback, **LONG).fit(second, SomebodysData())
    assert sparsities(second) == {0.5}
    assert callback.report is not first


def test_dense_weights_that_are_put_back_are_pruned_again(tmp_path):
    one, callback = module(), WandaPruning(sparsity=0.5)
    dense = {name: value.clone() for name, value in one.state_dict().items()}
    run = trainer(tmp_path, callback, cls=PruningTrainer)
    run.prune(one, SomebodysData(), save=False)
    one.load_state_dict(dense)
    report = run.prune(one, SomebodysData(), save=False)
    assert sparsities(one) == {0.5}
    assert list(report.evaluations) == ["dense", "pruned"]
    assert report.evaluations["dense"]["sparsity"] == 0


def test_a_model_that_somebody_else_pruned_is_not_told_to_be_this_callbacks(tmp_path):
    callback, other = WandaPruning(sparsity=0.5), module(1)
    prune_model(other.net, None, Magnitude(), Unstructured(0.5))
    for one in (module(0), other):
        trainer(tmp_path, callback).fit(one, SomebodysData())
    assert callback.report.method == "already pruned, not by this run's Wanda(variant=False)"


def test_the_same_cell_run_twice_prunes_once(tmp_path):
    one, callback = module(), WandaPruning(sparsity=0.5)
    run = trainer(tmp_path, callback, cls=PruningTrainer)
    run.prune(one, SomebodysData())
    before, report = [p.clone() for p in one.parameters()], callback.report
    run.prune(one, SomebodysData())
    assert callback.report is report
    assert all(map(torch.equal, one.parameters(), before))
    assert list(report.evaluations) == ["dense", "pruned"]


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_validation_measures_the_zeros_that_a_model_came_with(tmp_path, sparsity):
    one = module()
    prune_model(one.net, None, Magnitude(), Unstructured(sparsity))
    (metrics,) = trainer(tmp_path, WandaPruning(sparsity=0.75)).validate(one, batches(), verbose=False)
    assert metrics["sparsity"] == sparsity


def resumed(folder, *again, precision: str = "32-true"):
    """Train for two steps after pruning to 50 %, then resume with other callbacks."""
    last = ModelCheckpoint(folder, save_last=True)
    settings = {"enable_checkpointing": True, "precision": precision}
    trainer(folder / "a", WandaPruning(sparsity=0.5), last, max_steps=2, **settings).fit(module(), SomebodysData())
    one = module(1)
    run = trainer(folder / "b", *again, max_steps=4, precision=precision)
    run.fit(one, SomebodysData(), ckpt_path=folder / "last.ckpt")
    return one


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"sparsity": 0.75}, 0.75), ({"sparsity": 0.5, "allocation": {"*": 0.75}}, 0.75), ({"pattern": "1:4"}, 0.75)],
)
def test_resuming_with_more_asked_for_prunes_further(tmp_path, caplog, settings, expected):
    one = resumed(tmp_path, WandaPruning(**settings))
    assert zeros(one) == pytest.approx(expected, abs=0.02)  # rows that had more zeros keep them
    assert "it is pruned further" in caplog.text


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resuming_with_the_same_settings_does_not_prune_again(tmp_path, caplog, precision):
    callback = WandaPruning(sparsity=0.5)
    resumed(tmp_path, callback, precision=precision)
    assert "pruned before" not in caplog.text
    assert callback.report.method == "Wanda(variant=False)"


def test_resuming_with_less_asked_for_says_so(tmp_path, caplog):
    resumed(tmp_path, WandaPruning(sparsity=0.25))
    assert "50.00 % of the weights are zero, 25.00 % are asked for: it is not pruned again" in caplog.text


def test_a_report_that_is_not_true_is_not_saved(tmp_path):
    one = module()
    run = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer)
    run.prune(one, SomebodysData(), save=False)
    with torch.no_grad():
        one.net.model.layers[1].mlp.up_proj.weight.copy_(module().net.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(RuntimeError, match=r"1 linears differ \(model\.layers\.1\.mlp\.up_proj: 0\.00% .* says 50"):
        run.save_pretrained(one)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("second", [WandaPruning, SparseGPTPruning])
@pytest.mark.parametrize("named", [True, False])
def test_two_callbacks_in_one_trainer(tmp_path, second, named):
    where = {"output_dir": str(tmp_path / "results")} if named else {}
    callbacks = WandaPruning(pattern="2:4", ignore=MLP, **where), second(sparsity=0.75, targets=MLP, **where)
    one = module()
    run = trainer(tmp_path, *callbacks, cls=PruningTrainer)
    report = run.prune(one, SomebodysData())
    assert (zeros(one, "self_attn"), zeros(one, "mlp")) == (0.5, 0.75)
    assert report.evaluations["pruned"]["sparsity"] == pytest.approx(zeros(one))
    folder = tmp_path / "results" if named else tmp_path
    for file, linears in ((folder / "pruning.json", 8), (folder / "pruning-2/pruning.json", 6)):
        assert len(json.loads(file.read_text())["linears"]) == linears
    assert (folder / "model/model.safetensors").exists()
    assert not [*tmp_path.rglob("unfinished")]
    run.fit(one, SomebodysData())
    run.save_checkpoint(tmp_path / "two.ckpt")
    assert (zeros(one, "self_attn"), zeros(one, "mlp")) == (0.5, 0.75)
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert sum("Pruning" in key for key in saved) == 2


def test_the_sparsity_that_is_logged_is_of_the_lists_of_all_callbacks(tmp_path):
    one = module()
    one.net.tower = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)) for _ in range(2))
    callbacks = MagnitudePruning(0.5), MagnitudePruning(0.75, layers="tower")
    report = trainer(tmp_path, *callbacks, cls=PruningTrainer).prune(one, SomebodysData(), save=False)
    weights = [p for name, p in one.net.named_parameters() if "_proj" in name or "tower" in name]
    every = torch.cat([weight.flatten() for weight in weights])
    assert report.evaluations["pruned"]["sparsity"] == pytest.approx((every == 0).double().mean().item())


@pytest.mark.parametrize("how", ["prune", "fit"])
def test_two_callbacks_for_the_same_linears_are_refused(tmp_path, how):
    one = module()
    run = trainer(tmp_path, WandaPruning(), SparseGPTPruning(pattern="2:4", targets=MLP), cls=PruningTrainer)
    with pytest.raises(
        ValueError, match=r"Wanda\(.* and SparseGPT\(.*, prune model\.layers\.0\.mlp\.gate_proj: give each"
    ):
        getattr(run, how)(one, datamodule=SomebodysData())
    assert (zeros(one), [*tmp_path.rglob("pruning.json")]) == (0, [])


@pytest.mark.parametrize("second", [{"schedule": Gradual(0, 2, initial=0.5)}, {"allocation": {"*": 0.0}}])
def test_a_second_callback_may_prune_further_later_or_not_at_all(tmp_path, second):
    one = module()
    run = trainer(tmp_path, WandaPruning(sparsity=0.5), WandaPruning(sparsity=0.75, **second), **LONG)
    run.fit(one, SomebodysData())
    assert zeros(one) == (0.75 if "schedule" in second else 0.5)


@pytest.mark.parametrize("bare_first", [True, False])
@pytest.mark.parametrize("form", ["compiled", "adapted", "its decoder", "the same"])
def test_another_form_of_the_model_beside_it_is_no_second_model(form, bare_first):
    net = tiny_llama(layers=2)
    if form == "compiled":
        other = torch.compile(net)
    elif form == "adapted":
        peft = pytest.importorskip("peft")
        other = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj"]))
    else:
        other = net.model if form == "its decoder" else net
    holder = torch.nn.Module()
    for name, model in [("a", net), ("b", other)] if bare_first else [("a", other), ("b", net)]:
        setattr(holder, name, model)
    assert find_language_model(holder) is (other if form == "adapted" else net)
    holder.c = tiny_llama(layers=2)
    with pytest.raises(ValueError, match=r"exactly one transformers model to prune, found: .*c \(LlamaForCausalLM\)"):
        find_language_model(holder)


def test_without_calibration_and_training_too(tmp_path):
    callback = MagnitudePruning(sparsity=0.5)
    for seed in (0, 1):
        one = module(seed)
        trainer(tmp_path, callback, max_steps=0).fit(one, token_batches())
        assert zeros(one) == pytest.approx(0.5)


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 5


def test_a_schedule_that_ended_early_has_written_what_the_weights_have(tmp_path):
    one, callback = module(), WandaPruning(sparsity=0.5, schedule=Gradual(0, 8, 2, regrow=True))
    trainer(tmp_path, callback, Stop(), **LONG).fit(one, SomebodysData())
    assert json.loads((tmp_path / "pruning.json").read_text())["sparsity"] == zeros(one) < 0.1


def test_a_schedule_that_ended_early_begins_anew_with_the_next_model(tmp_path):
    callback = WandaPruning(sparsity=0.5, schedule=Gradual(0, 8, 2, regrow=True))
    first, second = module(0), module(1)
    run = trainer(tmp_path, callback, Stop(), cls=PruningTrainer, **LONG)
    run.fit(first, SomebodysData())
    assert callback.report.sparsity == zeros(first) < 0.1  # read back from weights that have regrown
    run.save_pretrained(first)
    trainer(tmp_path, callback, **LONG).fit(second, SomebodysData())
    assert sparsities(second) == {0.5}


def test_a_schedule_keeps_the_zeros_that_a_model_came_with(tmp_path):
    one = module()
    prune_model(one.net, None, Magnitude(), Unstructured(0.5))
    before = {name: p == 0 for name, p in one.net.named_parameters()}
    trainer(tmp_path, WandaPruning(sparsity=0.75, schedule=Gradual(0, 8, 2)), **LONG).fit(one, SomebodysData())
    assert all(not p[before[name]].any() for name, p in one.net.named_parameters())
    assert zeros(one) == pytest.approx(0.75, abs=0.02)


def test_a_checkpoint_that_is_loaded_twice_keeps_what_was_found_of_it_in_between(tmp_path):
    """But not what was found of other weights of the same run."""
    callback, model, best = WandaPruning(sparsity=0.5), module(), tmp_path / "step=2.ckpt"
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    run = trainer(tmp_path, callback, checkpoints, max_steps=4, enable_checkpointing=True)
    run.fit(model, batches())
    run.validate(model, batches(2), verbose=False)
    run.test(model, batches(2), ckpt_path=best, verbose=False)
    assert "fine-tuned" not in callback.evaluations
    (found,) = run.validate(model, batches(2), ckpt_path=best, verbose=False)
    run.test(model, batches(2), ckpt_path=best, verbose=False)
    assert callback.evaluations["fine-tuned"] == pytest.approx(found)
