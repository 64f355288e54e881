"""Width and depth pruning as callbacks: once, before optimizers, again when a checkpoint is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import smaller_with_ddp
import torch
from helpers import SomebodysData, SomebodysModule, batches, loader, sparsities, tiny_llama, token_batches, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from wanda_lightning.callbacks import DepthPruning, WandaPruning, WidthPruning
from wanda_lightning.callbacks.plumbing.before_setup import before_setup
from wanda_lightning.callbacks.shape_pruning import due_callbacks
from wanda_lightning.engine.depth import prune_depth
from wanda_lightning.engine.layer_choice import LayerChooser
from wanda_lightning.engine.neuron_removal import NeuronRemoval
from wanda_lightning.engine.width import prune_width
from wanda_lightning.runs.causal_lm import CausalLM


def by_the_engine(**settings):
    model = tiny_llama(layers=2)
    prune_width(model, token_batches(seed=3), 0.5, **settings)
    prune_depth(model, token_batches(seed=3), 1)
    return model


def both():
    return WidthPruning(keep=0.5), DepthPruning(layers=1)


@pytest.mark.parametrize("lazy", [False, True])
def test_does_what_the_engine_does(tmp_path, lazy):
    module = SomebodysModule(lazy=lazy)
    trainer(tmp_path, *both(), max_steps=0).fit(module, datamodule=SomebodysData())
    expected = by_the_engine()
    assert all(map(torch.equal, module.net.state_dict().values(), expected.state_dict().values()))
    assert module.net.config.intermediate_size == 32
    assert module.net.config.num_hidden_layers == len(module.net.model.layers) == 1


def test_optimizers_hold_the_parameters_that_there_are(tmp_path):
    module, run = SomebodysModule(), trainer(tmp_path, *both())
    run.fit(module, datamodule=SomebodysData())
    held = {parameter for group in run.optimizers[0].param_groups for parameter in group["params"]}
    assert held == set(module.net.parameters())
    expected = by_the_engine()
    down = "model.layers.0.mlp.down_proj.weight"
    assert module.net.get_parameter(down).shape == expected.get_parameter(down).shape
    assert not torch.equal(module.net.get_parameter(down), expected.get_parameter(down))  # it did train


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions(tmp_path, precision):
    module = SomebodysModule()
    trainer(tmp_path, *both(), precision=precision).fit(module, datamodule=SomebodysData())
    assert (
        module.net.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16 if "true" in precision else torch.float32
    )
    assert module.net.config.intermediate_size == 32


def test_validate_and_test_change_nothing(tmp_path):
    module = SomebodysModule()
    before = [parameter.clone() for parameter in module.parameters()]
    run = trainer(tmp_path, *both())
    run.validate(module, batches(), verbose=False)
    run.test(module, batches(), verbose=False)
    assert all(map(torch.equal, module.parameters(), before))


def test_once_for_a_model_and_again_for_another(tmp_path):
    module, callbacks = SomebodysModule(), both()
    run = trainer(tmp_path, *callbacks, limit_train_batches=0)
    run.validate(module, batches(), verbose=False)
    run.fit(module, datamodule=SomebodysData())
    reports = [callback.report for callback in callbacks]
    run.validate(module, batches(), verbose=False)
    run.limit_train_batches = 1.0
    run.fit(module, datamodule=SomebodysData())
    run.validate(module, batches(), verbose=False)
    assert [callback.report for callback in callbacks] == reports
    assert module.net.config.intermediate_size == 32
    assert list(callbacks[0].evaluations) == ["dense", "smaller", "fine-tuned"]
    plain = json.loads((tmp_path / "shrinking.json").read_text())
    assert plain["steps"][0]["sizes"] == {"intermediate_size": [64, 32]}
    assert plain["steps"][1]["gone"] == reports[1].gone
    assert plain["parameters"][1] == plain["model"]["parameters"] == sum(p.numel() for p in module.net.parameters())
    assert plain["calibration"]["tokens"] == 128
    assert list(plain["evaluations"]) == ["dense", "smaller", "fine-tuned"]
    assert "intermediate_size" in (tmp_path / "shrinking.md").read_text()
    other = SomebodysModule()
    trainer(tmp_path, *callbacks, max_steps=0).fit(other, datamodule=SomebodysData())
    assert other.net.config.intermediate_size == 32
    assert callbacks[0].evaluations == {}


def test_calibrates_with_the_train_dataloader_where_there_is_no_other(tmp_path):
    module, pruning = SomebodysModule(), WidthPruning(keep=0.5, num_samples=3)
    trainer(tmp_path, pruning, max_steps=1).fit(module, batches())
    assert pruning.report.tokens == 2 * 2 * 16


def test_zeros_on_the_smaller_model(tmp_path):
    module = SomebodysModule()
    sparse = WandaPruning(pattern="2:4")
    trainer(tmp_path, *both(), sparse).fit(module, datamodule=SomebodysData())
    assert sparsities(module) == {0.5}
    assert {row.shape for row in sparse.report.linears} == {(32, 32), (16, 32)}
    assert module.net.config.num_hidden_layers == 1


def test_a_run_that_was_cut_off_goes_on_behind_its_finished_layers(tmp_path, monkeypatch):
    """Also one whose neurons were through, and which failed while it chose layers."""
    solved: list[int] = []
    prune, choose = NeuronRemoval.prune, LayerChooser.by_angle

    def run(neurons, layers, **settings):
        solved.clear()
        monkeypatch.setattr(NeuronRemoval, "prune", lambda *args: solved.append(1) or neurons(*args))
        monkeypatch.setattr(LayerChooser, "by_angle", layers)
        pruning = WidthPruning(keep=0.5, **settings), DepthPruning(layers=1)
        module = SomebodysModule()
        trainer(tmp_path, *pruning, max_steps=0).fit(module, datamodule=SomebodysData())
        return module

    def fails(*_, **__):
        raise InterruptedError

    def fails_second(*args):
        return prune(*args) if len(solved) == 1 else fails()

    with pytest.raises(InterruptedError):
        run(fails_second, choose)
    assert len([*tmp_path.glob("unfinished-0/layer-*")]) == 1
    with pytest.raises(InterruptedError):
        run(prune, fails)
    assert len(solved) == 1
    module = run(prune, choose)
    assert not solved
    assert all(map(torch.equal, module.net.state_dict().values(), by_the_engine().state_dict().values()))
    assert not [*tmp_path.glob("unfinished*")]
    with pytest.raises(InterruptedError):
        run(fails_second, choose)
    run(prune, choose, resume=False)
    assert len(solved) == 2


@pytest.mark.parametrize("lazy", [False, True])
def test_a_checkpoint_is_loaded_into_a_module_of_its_shapes(tmp_path, lazy):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)  # an epoch has four batches
    module, settings = SomebodysModule(lazy=lazy), {"enable_checkpointing": True, "max_steps": 6}
    trainer(tmp_path, *both(), checkpoint, **settings).fit(module, datamodule=SomebodysData())
    saved = next(tmp_path.glob("*step=4.ckpt"))
    resumed, callbacks = SomebodysModule(lazy=lazy), both()

    class NoCalibration(SomebodysData):
        def calibration_dataloader(self):
            raise AssertionError("pruned again")

    trainer(tmp_path, *callbacks, max_steps=6).fit(resumed, datamodule=NoCalibration(), ckpt_path=saved)
    assert all(map(torch.equal, resumed.net.state_dict().values(), module.net.state_dict().values()))
    assert callbacks[1].report.kept
    assert callbacks[0].report.sizes == {"intermediate_size": (64, 32)}
    evaluated = SomebodysModule(lazy=lazy)
    trainer(tmp_path, *both()).validate(evaluated, batches(), ckpt_path=saved, verbose=False)
    there = torch.load(saved, weights_only=True)["state_dict"]
    assert all(torch.equal(there[name], tensor) for name, tensor in evaluated.state_dict().items())
    assert evaluated.net.generate(token_batches()[0][:1], max_new_tokens=3, do_sample=False).shape == (1, 19)


@pytest.mark.parametrize("after_fit", [False, True])
def test_a_checkpoint_of_the_weights_alone_is_loaded(tmp_path, after_fit):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_weights_only=True)
    module, run = SomebodysModule(), trainer(tmp_path, *both(), checkpoint, enable_checkpointing=True)
    run.fit(module, datamodule=SomebodysData())
    saved = tmp_path / "by_hand.ckpt" if after_fit else checkpoint.best_model_path
    if after_fit:
        run.save_checkpoint(saved, weights_only=True)
    evaluated = SomebodysModule()
    trainer(tmp_path, *both()).validate(evaluated, batches(), ckpt_path=saved, verbose=False)
    assert all(map(torch.equal, evaluated.state_dict().values(), module.state_dict().values()))


def test_a_checkpoint_with_fewer_key_value_groups_is_loaded(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    module, settings = SomebodysModule(), {"enable_checkpointing": True, "max_steps": 6}
    pruning = WidthPruning(keep=0.5, attention_keep=0.5)
    trainer(tmp_path, pruning, checkpoint, **settings).fit(module, datamodule=SomebodysData())
    expected = tiny_llama(layers=2)
    report = prune_width(expected, token_batches(seed=3), 0.5, attention_keep=0.5)
    assert pruning.report.figures == report.figures
    shapes = {name: tensor.shape for name, tensor in module.net.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in expected.state_dict().items()}
    resumed, again = SomebodysModule(), WidthPruning(keep=0.5, attention_keep=0.5)
    saved = next(tmp_path.glob("*step=4.ckpt"))
    trainer(tmp_path, again, max_steps=6).fit(resumed, datamodule=SomebodysData(), ckpt_path=saved)
    assert all(map(torch.equal, resumed.net.state_dict().values(), module.net.state_dict().values()))
    assert resumed.net.config.num_attention_heads == 2
    assert due_callbacks([again], resumed.net) == []


@pytest.mark.parametrize(
    "pair",
    [
        lambda: [DepthPruning(layers=1), DepthPruning(layers=2, choice="contiguous")],
        lambda: [WidthPruning(keep=0.5), WidthPruning(keep=0.25)],
    ],
)
def test_two_of_a_kind_prune_once_each_and_are_resumed(tmp_path, pair):
    class Deeper(SomebodysModule):
        def __init__(self):
            super().__init__()
            self.net = tiny_llama(layers=4)

    module, callbacks, checkpoint = Deeper(), pair(), ModelCheckpoint(tmp_path, every_n_train_steps=2)
    trainer(tmp_path, *callbacks, max_steps=0).fit(module, datamodule=SomebodysData())
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    sizes = [pair for step in json.loads((tmp_path / "shrinking.json").read_text())["steps"] for pair in step["sizes"]]
    run = trainer(tmp_path, *callbacks, checkpoint, max_steps=2, enable_checkpointing=True)
    run.fit(module, datamodule=SomebodysData())
    assert len(sizes) == 2
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == shapes
    resumed, again = Deeper(), pair()
    for _ in range(2):  # the second time it has these shapes already
        saved = checkpoint.best_model_path
        trainer(tmp_path, *again, max_steps=2).fit(resumed, datamodule=SomebodysData(), ckpt_path=saved)
        assert all(map(torch.equal, resumed.state_dict().values(), module.state_dict().values()))


def test_what_a_checkpoint_says_counts_whatever_the_callback_asks_for(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    run = trainer(tmp_path, *both(), checkpoint, max_steps=2, enable_checkpointing=True)
    run.fit(SomebodysModule(), datamodule=SomebodysData())
    resumed = SomebodysModule()
    callbacks = WidthPruning(keep=0.75, overwrite=True), DepthPruning(layers=1)
    trainer(tmp_path, *callbacks, max_steps=3).fit(
        resumed, datamodule=SomebodysData(), ckpt_path=checkpoint.best_model_path
    )
    assert resumed.net.config.intermediate_size == 32


def test_all_processes_end_with_the_same_model(tmp_path):
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, smaller_with_ddp.__file__, str(tmp_path)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
    )
    (first, kept, tokens), (second, *_) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.layers.0.mlp.down_proj.weight"].shape == (32, 32)
    alone = tiny_llama(layers=2)
    reports = prune_width(alone, token_batches(seed=3), 0.5), prune_depth(alone, token_batches(seed=3), 1)
    assert kept == [[[*pair] for pair in reports[0].kept], reports[1].kept]
    assert tokens == reports[0].tokens


def test_strategies_that_cannot_work_are_refused(tmp_path):
    module = SomebodysModule()
    with pytest.raises(Exception, match="whose model keeps its shapes"):
        trainer(tmp_path, *both(), strategy="ddp_fork", devices=2).fit(module, datamodule=SomebodysData())


def test_a_folder_of_other_settings_is_not_overwritten(tmp_path):
    trainer(tmp_path, *both(), max_steps=0).fit(SomebodysModule(), datamodule=SomebodysData())
    other = SomebodysModule()
    with pytest.raises(ValueError, match=r"holds the results of another run.*'keep': 0.5.*'keep': 0.75"):
        trainer(tmp_path, WidthPruning(keep=0.75), max_steps=0).fit(other, datamodule=SomebodysData())
    assert other.net.config.intermediate_size == 64
    callback = WidthPruning(keep=0.75, overwrite=True)
    trainer(tmp_path, callback, max_steps=0).fit(other, datamodule=SomebodysData())
    assert other.net.config.intermediate_size == 48


@pytest.mark.parametrize("make", [lambda: WidthPruning(keep=0.75), lambda: DepthPruning(layers=1)])
def test_a_fast_dev_run_leaves_results_as_they_are_and_has_none(tmp_path, make):
    def run(folder, *callbacks, **settings):
        trainer(tmp_path / folder, *callbacks, **settings).fit(SomebodysModule(), datamodule=SomebodysData())
        return {str(file): file.read_bytes() for file in (tmp_path / folder).rglob("*.*")}

    (tmp_path / "used/unfinished-0").mkdir(parents=True)
    (tmp_path / "used/unfinished-0/layer-00000.safetensors").touch()  # of a run that was cut off
    before = run("used", DepthPruning(layers=0), max_steps=0)
    assert run("used", make(), fast_dev_run=True) == before
    assert run("new", make(), fast_dev_run=True) == {}


@pytest.mark.parametrize("make", [lambda: WidthPruning(keep=0.5), lambda: DepthPruning(layers=1)])
@pytest.mark.parametrize("average", [EMAWeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=0.01)])
def test_averages_of_the_larger_weights_are_refused_before_anything_changes(tmp_path, make, average):
    module = SomebodysModule()
    with pytest.raises(ValueError, match="has copied the weights before they are made smaller"):
        trainer(tmp_path, make(), average()).fit(module, datamodule=SomebodysData())
    assert all(map(torch.equal, module.parameters(), SomebodysModule().parameters()))


def test_weights_that_are_smaller_already_are_averaged(tmp_path):
    module, pruning = SomebodysModule(), WidthPruning(keep=0.5)
    trainer(tmp_path, pruning, max_steps=0).fit(module, datamodule=SomebodysData())
    run = trainer(tmp_path, pruning, EMAWeightAveraging())
    run.fit(module, datamodule=SomebodysData())
    assert (run.global_step, module.net.config.intermediate_size) == (3, 32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WidthPruning(keep=0), "keep must be a fraction"),
        (lambda: WidthPruning(choice="best"), "choice must be one of"),
        (lambda: WidthPruning(attention_keep=0.0), "attention_keep must be a fraction"),
        (lambda: WidthPruning(num_samples=0), "num_samples must be"),
        (lambda: WidthPruning(activations="gpu"), "activations must be one of"),
        (lambda: DepthPruning(layers=-1), "layers must be a whole number"),
        (lambda: DepthPruning(choice="best"), "choice must be one of"),
        (lambda: DepthPruning(activations="gpu"), "activations must be one of"),
    ],
)
def test_settings_are_checked_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_too_many_layers_are_refused_before_anything_changes(tmp_path):
    module = SomebodysModule()
    with pytest.raises(ValueError, match="layers=2 of 2 decoder layers leaves none"):
        trainer(tmp_path, WidthPruning(keep=0.5), DepthPruning(layers=2)).fit(module, datamodule=SomebodysData())
    assert module.net.config.intermediate_size == 64
    assert len(module.net.model.layers) == 2


@pytest.mark.parametrize("make", [lambda: WidthPruning(keep=0.5), lambda: DepthPruning(layers=1)])
def test_a_streamed_model_is_refused(tmp_path, tiny_model_folder, make):
    module = CausalLM(str(tiny_model_folder), stream=True)
    with pytest.raises(ValueError, match="a model that is streamed from disk keeps its shapes: load it without stream"):
        trainer(tmp_path, make(), max_steps=0).fit(module, loader())
    assert not (tmp_path / "shrinking.json").exists()


def test_a_run_that_failed_leaves_nothing_behind(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    done = []
    for number in range(2):
        before_setup(run, lambda number=number: done.append(number), lambda _: None)
    run.fit(SomebodysModule(), datamodule=SomebodysData())
    assert done == [1]
    assert not {"setup", "load_model_state_dict"} & vars(run.strategy).keys()


def test_the_model_is_moved_to_its_device_before_it_is_pruned(tmp_path, tiny_model_folder, monkeypatch):
    """Which changes nothing on a CPU; on a GPU it would be pruned in the wrong place."""
    callback, order = DepthPruning(layers=1), []
    run = trainer(tmp_path, callback, max_steps=0)
    move, prune = run.strategy.model_to_device, callback.prune
    monkeypatch.setattr(run.strategy, "model_to_device", lambda: order.append("moved") or move())
    callback.prune = lambda *args, **settings: order.append("pruned") or prune(*args, **settings)
    run.fit(CausalLM(str(tiny_model_folder)), loader())
    assert order[: order.index("pruned") + 1] == ["moved", "pruned"]


@pytest.mark.parametrize(
    ("swept", "plain"),
    [
        (WidthPruning(np.float32(0.7), multiple=np.int64(8)), WidthPruning(0.7, multiple=8)),
        (DepthPruning(np.int64(1), num_samples=np.int64(4)), DepthPruning(1, num_samples=4)),
    ],
)
def test_numpys_numbers_are_those_of_python(swept, plain):
    assert repr([swept.settings, swept.num_samples]) == repr([plain.settings, plain.num_samples])
