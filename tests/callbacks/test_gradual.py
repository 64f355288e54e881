"""Pruning in several steps while training, and pruning what was pruned before."""

import json
import logging

import pytest
import torch
from helpers import SomebodysData, SomebodysModule, batches, sparsities, tiny_llama, token_batches, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from wanda_lightning.allocation.owl import OWL
from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.callbacks import (
    MagnitudePruning,
    PruningCallback,
    SparseFinetuning,
    SparseGPTPruning,
    WandaPruning,
)
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Ablate, Magnitude, Wanda
from wanda_lightning.runs.trainer import PruningTrainer
from wanda_lightning.sparsity import Unstructured

LONG = {"max_steps": 10, "max_epochs": -1}


class Watch(Callback):
    """Notes where the zeros are after every step; put behind the pruning callback."""

    def __init__(self):
        self.zeros = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = pl_module.net.model.layers.named_parameters()
        self.zeros.append({name: weight == 0 for name, weight in weights if weight.dim() == 2})

    def sparsity(self, step: int) -> float:
        zeros = list(self.zeros[step - 1].values())
        return sum(int(z.sum()) for z in zeros) / sum(z.numel() for z in zeros)


def test_the_cubic_curve_is_equation_1_of_zhu_and_gupta():
    """With their own symbols: s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 for t in {t_0, ..., t_0 + n dt}."""
    s_i, s_f, t_0, n, dt = 0.1, 0.8, 20, 6, 5
    schedule = Gradual(start=t_0, end=t_0 + n * dt, every=dt, initial=s_i)
    for t in range(t_0, t_0 + n * dt + 1, dt):
        expected = s_f + (s_i - s_f) * (1 - (t - t_0) / (n * dt)) ** 3
        assert schedule.sparsity(t, s_f) == pytest.approx(expected, abs=1e-12)
        assert schedule.last_due(t) == t
    assert schedule.sparsity(t_0, s_f) == pytest.approx(s_i)
    assert schedule.sparsity(t_0 + n * dt, s_f) == s_f == schedule.sparsity(1000, s_f)
    assert schedule.sparsity(t_0 - 1, s_f) == 0.0


def test_the_linear_curve_is_a_line():
    schedule = Gradual(start=10, end=20, every=1, curve="linear")
    assert [round(schedule.sparsity(t, 0.5), 9) for t in (10, 12, 15, 20, 30)] == [0.0, 0.1, 0.25, 0.5, 0.5]


def test_when_it_prunes():
    schedule = Gradual(start=2, end=9, every=3)
    assert [schedule.last_due(t) for t in range(12)] == [None, None, 2, 2, 2, 5, 5, 5, 8, 9, 9, 9]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "start of a gradual schedule must be a whole number of at least 0, got -1"),
        ({"end": 2}, "end of a gradual schedule must be a whole number of at least 3, got 2"),
        ({"every": 0}, "every of a gradual schedule must be a whole number of at least 1, got 0"),
        ({"curve": "square"}, "curve must be one of cubic, linear, got 'square'"),
        ({"start": "1"}, "start of a gradual schedule must be a whole number of at least 0, got '1'"),
        ({"initial": "none"}, r"initial must be a sparsity in \[0, 1\), got 'none'"),
        ({"initial": 1.0}, r"initial must be a sparsity in \[0, 1\), got 1.0"),
    ],
)
def test_bad_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Gradual(**{"start": 2, "end": 8, "every": 2} | settings)


@pytest.mark.parametrize("curve", ["cubic", "linear"])
@pytest.mark.parametrize("callback", [WandaPruning, MagnitudePruning])
def test_sparsity_follows_the_curve_and_the_mask_only_grows(tmp_path, callback, curve):
    schedule, watch = Gradual(start=2, end=8, every=2, curve=curve), Watch()
    module, pruning = SomebodysModule(), callback(sparsity=0.6, schedule=schedule)
    trainer(tmp_path, pruning, watch, **LONG).fit(module, datamodule=SomebodysData())
    for step in range(1, 11):
        due = min(step - step % 2, 8)
        assert watch.sparsity(step) == pytest.approx(schedule.sparsity(due, 0.6) if due >= 2 else 0, abs=1 / 32)
    for before, after in zip(watch.zeros, watch.zeros[1:], strict=False):
        assert all(after[name][zero].all() for name, zero in before.items())
    assert watch.zeros[-1].keys() == {name for name, p in module.net.model.layers.named_parameters() if p.dim() == 2}
    expected = tiny_llama(layers=2)  # exactly what a one-shot pruning to the final sparsity gives
    prune_model(expected, token_batches(), pruning.method, Unstructured(0.6))
    assert sparsities(module) == {
        (m.weight == 0).float().mean().item()
        for n, m in expected.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }


def test_every_pruning_is_what_the_engine_does_to_the_weights_of_that_moment(tmp_path):
    seen = {}

    class Before(Callback):  # in front of the pruning callback: the weights after the optimizer's step
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen[trainer.global_step] = {n: p.clone() for n, p in pl_module.net.named_parameters()}

    class After(Before):
        pass

    class Last(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step in (4, 6):
                expected = tiny_llama(layers=2)
                expected.load_state_dict(seen[trainer.global_step])
                final = Gradual(2, 6, 2).sparsity(trainer.global_step, 0.6)
                prune_model(expected, token_batches(seed=3), pruning.method, Unstructured(final))
                assert all(map(torch.equal, pl_module.net.parameters(), expected.parameters()))
                checked.append(trainer.global_step)

    checked, pruning = [], WandaPruning(sparsity=0.6, schedule=Gradual(2, 6, 2))
    trainer(tmp_path, Before(), pruning, Last(), **LONG).fit(SomebodysModule(), datamodule=SomebodysData())
    assert checked == [4, 6]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.5),
        lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.99, nesterov=True),
    ],
    ids=["adamw", "sgd-momentum"],
)
def test_momentum_does_not_bring_weights_back(tmp_path, optimizer):
    module = SomebodysModule(optimizer=optimizer)
    watch, pruning = Watch(), WandaPruning(sparsity=0.5, schedule=Gradual(0, 6, 3, curve="linear"))
    trainer(tmp_path, pruning, watch, **LONG).fit(module, datamodule=SomebodysData())
    assert [round(watch.sparsity(step), 6) for step in (2, 3, 4, 5, 6, 7, 10)] == [0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5]


def test_regrown_weights_change_the_mask_and_the_last_one_holds(tmp_path):
    watch, schedule = Watch(), Gradual(2, 6, 2, regrow=True)
    module = SomebodysModule(optimizer=lambda params, lr: torch.optim.AdamW(params, lr=0.1))
    trainer(tmp_path, WandaPruning(sparsity=0.5, schedule=schedule), watch, **LONG).fit(
        module, datamodule=SomebodysData()
    )
    assert watch.sparsity(3) < 0.01  # they train on between two prunings
    came_back = sum(int((watch.zeros[3][name] & ~zero).sum()) for name, zero in watch.zeros[5].items())
    assert came_back > 0
    assert {watch.sparsity(step) for step in (6, 7, 8, 9, 10)} == {0.5}
    assert sparsities(module) == {0.5}


def test_second_order_methods(tmp_path):
    with pytest.raises(ValueError, match="may come back: use regrow=True"):
        SparseGPTPruning(sparsity=0.5, schedule=Gradual(0, 6, 2))
    module = SomebodysModule()
    pruning = SparseGPTPruning(sparsity=0.5, schedule=Gradual(0, 6, 2, regrow=True))
    trainer(tmp_path, pruning, **LONG).fit(module, datamodule=SomebodysData())
    assert sparsities(module) == {0.5}
    watch, module = Watch(), SomebodysModule()
    pruning = PruningCallback(Ablate(), 0.5, schedule=Gradual(0, 6, 2), overwrite=True)  # chooses before it updates
    trainer(tmp_path, pruning, watch, **LONG).fit(module, datamodule=SomebodysData())
    for before, after in zip(watch.zeros, watch.zeros[1:], strict=False):
        assert all(after[name][zero].all() for name, zero in before.items())
    assert sparsities(module) == {0.5}


def test_resuming_in_the_middle_is_as_if_uninterrupted(tmp_path):
    """Also from a step between two prunings, with the second epoch still to come."""

    def run(folder, steps, ckpt_path=None):
        torch.manual_seed(0)
        module, callback = SomebodysModule(), WandaPruning(sparsity=0.6, schedule=Gradual(0, 8, 2))
        checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        settings = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": True}
        run = trainer(folder, callback, checkpoints, **settings)
        run.fit(module, datamodule=SomebodysData(), ckpt_path=ckpt_path)
        return module, callback

    whole, expected = run(tmp_path / "whole", 12)
    for step in (4, 5, 8):
        resumed, callback = run(tmp_path / "parts", 12, ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        if step != 5:  # at the end of an epoch: Lightning does not restore the place within one by itself
            assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
        assert sparsities(resumed) == sparsities(whole)
        assert callback.state_dict()["pruned_at"] == 8
        assert callback.report.sparsity == expected.report.sparsity


@pytest.mark.parametrize("layer", [0, 1])
def test_a_pruning_that_was_cut_off_is_done_when_the_run_goes_on(tmp_path, monkeypatch, layer):
    solved = []

    def cut_off(self, weight, statistic, pattern):
        solved.append(weight)
        if len(solved) == 2 * 14 + 7 * layer + 1:  # in the last of three prunings
            raise InterruptedError
        return prune(self, weight, statistic, pattern)

    prune = Wanda.prune
    monkeypatch.setattr(Wanda, "prune", cut_off)
    run = trainer(tmp_path, WandaPruning(sparsity=0.5, schedule=Gradual(0, 6, 2)), **LONG)
    with pytest.raises(InterruptedError):
        run.fit(SomebodysModule(), datamodule=SomebodysData())
    run.save_checkpoint(tmp_path / "cut_off.ckpt")  # as OnExceptionCheckpoint does, or a signal of SLURM
    module, again = SomebodysModule(), WandaPruning(sparsity=0.5, schedule=Gradual(0, 6, 2))
    trainer(tmp_path / "again", again, **LONG).fit(
        module, datamodule=SomebodysData(), ckpt_path=tmp_path / "cut_off.ckpt"
    )
    assert sparsities(module) == {0.5}


def test_accumulated_batches_are_one_step(tmp_path):
    module, watch = SomebodysModule(), Watch()
    pruning = WandaPruning(sparsity=0.5, schedule=Gradual(0, 4, 2, curve="linear"))
    settings = {"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": 2}
    trainer(tmp_path, pruning, watch, **settings).fit(module, datamodule=SomebodysData())
    assert [watch.sparsity(batch) for batch in range(1, 11)] == [0, 0, 0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5]


@pytest.mark.slow
def test_two_processes_prune_gradually_as_one(tmp_path):
    module = SomebodysModule()
    pruning = WandaPruning(sparsity=0.5, schedule=Gradual(0, 2, 1))
    settings = {"max_steps": 3, "max_epochs": -1, "devices": 2, "strategy": "ddp_spawn"}
    trainer(tmp_path, pruning, **settings, use_distributed_sampler=False).fit(module, datamodule=SomebodysData())
    assert sparsities(module) == {0.5}
    report = json.loads((tmp_path / "pruning.json").read_text())
    assert {row["tokens"] for row in report["linears"]} == {4 * 2 * 16}


def test_averages_follow_the_growing_mask(tmp_path):
    module = SomebodysModule()
    pruning = WandaPruning(sparsity=0.5, schedule=Gradual(0, 8, 2))
    trainer(tmp_path, EMAWeightAveraging(decay=0.9), pruning, **LONG).fit(module, datamodule=SomebodysData())
    assert sparsities(module) == {0.5}


def test_sparsity_is_logged_at_every_step_of_the_schedule(tmp_path):
    logger = CSVLogger(tmp_path)
    schedule = Gradual(1, 7, 3, curve="linear", initial=0.25)
    pruning = WandaPruning(sparsity=0.75, schedule=schedule)
    trainer(tmp_path, pruning, logger=logger, **LONG).fit(SomebodysModule(), batches())
    logger.save()
    header, *rows = [r.split(",") for r in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    place = header.index("sparsity")
    logged = [(int(row[header.index("step")]), float(row[place])) for row in rows if row[place]]
    assert logged == [(1, 0.25), (4, 0.5), (7, 0.75)]
    report = json.loads((tmp_path / "lightning_logs/version_0/pruning.json").read_text())
    assert report["sparsity"] == report["target_sparsity"] == 0.75


def test_a_schedule_that_cannot_end_is_refused(tmp_path):
    pruning = WandaPruning(sparsity=0.5, schedule=Gradual(0, 8, 2))
    with pytest.raises(ValueError, match="schedule ends at step 8, training at step 7"):
        trainer(tmp_path, pruning, max_steps=7, max_epochs=-1).fit(SomebodysModule(), datamodule=SomebodysData())
    with pytest.raises(ValueError, match="this run has no training steps"):
        trainer(tmp_path, pruning, max_steps=0).fit(SomebodysModule(), datamodule=SomebodysData())
    with pytest.raises(ValueError, match="prunes while a model trains: use fit"):
        trainer(tmp_path, pruning, cls=PruningTrainer).prune(SomebodysModule(), SomebodysData())


def test_how_long_epochs_of_a_stream_are_nobody_knows(tmp_path):
    module, pruning = SomebodysModule(), WandaPruning(sparsity=0.5, schedule=Gradual(0, 4, 2))
    trainer(tmp_path, pruning, max_steps=-1, max_epochs=1).fit(module, (batch for batch in batches()))
    assert sparsities(module) == {0.5}


def test_a_fast_dev_run_prunes_as_at_the_end_of_the_schedule(tmp_path, caplog):
    module = SomebodysModule()
    pruning = WandaPruning(sparsity=0.5, schedule=Gradual(4, 100, 8))
    trainer(tmp_path, pruning, fast_dev_run=True).fit(module, datamodule=SomebodysData())
    assert sparsities(module) == {0.5}
    assert "training ended" not in caplog.text


def test_training_that_ends_too_early_says_so(tmp_path, caplog):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 5

    pruning = WandaPruning(sparsity=0.5, schedule=Gradual(0, 8, 4, curve="linear"))
    trainer(tmp_path, pruning, Stop(), **LONG).fit(SomebodysModule(), datamodule=SomebodysData())
    assert "ended at step 5, the gradual schedule would at step 8: sparsity is 25.00 %, not 50.00 %" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "2:4"}, "prunes unstructured patterns only, got 2:4"),
        ({"allocation": {"q_proj": 0.2}}, "prunes all linears alike, got the allocation"),
        ({"allocation": OWL()}, r"prunes all linears alike, got the allocation OWL\("),
        ({"allocation": OWL(), "pattern": "2:4", "schedule": None}, r"OWL\(.*splits an unstructured sparsity"),
        ({"sparsity": 0.3, "schedule": Gradual(0, 8, 2, initial=0.4)}, "starts at sparsity 0.4, above the final 0.3"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WandaPruning(**{"schedule": Gradual(0, 8, 2)} | settings)


def test_a_pruned_model_that_meets_the_target_is_not_pruned_again(tmp_path, caplog):
    module, callback = SomebodysModule(), WandaPruning(sparsity=0.5)
    prune_model(module.net, None, Magnitude(), Unstructured(0.5))
    zeros = [p == 0 for p in module.net.parameters()]
    before = [p.clone() for p in module.net.parameters()]
    run = trainer(tmp_path, callback, cls=PruningTrainer)
    run.prune(module, SomebodysData(), save=False)
    assert all(map(torch.equal, module.net.parameters(), before))
    run.fit(module, datamodule=SomebodysData())
    assert "50.00 % of the weights are zero, 50.00 % are asked for: it is not pruned again" in caplog.text
    assert all(not p[zero].any() for p, zero in zip(module.net.parameters(), zeros, strict=True))
    assert not all(map(torch.equal, module.net.parameters(), before))
    report = json.loads((tmp_path / "pruning.json").read_text())
    assert report["method"] == "already pruned, not by this run's Wanda(variant=False)"
    assert report["sparsity"] == 0.5
    assert list(report["evaluations"]) == ["as loaded", "pruned"]


def test_a_2_of_4_model_is_known_by_its_groups(tmp_path):
    half, module = SomebodysModule(), SomebodysModule()
    prune_model(half.net, None, Magnitude(), Unstructured(0.5))
    callback = WandaPruning(pattern="2:4")
    trainer(tmp_path, callback, max_steps=0).fit(half, datamodule=SomebodysData())
    assert callback.report.method == "Wanda(variant=False)"  # half of the weights, but not two of every four
    groups = half.net.model.layers[0].mlp.up_proj.weight.reshape(-1, 4)
    assert ((groups != 0).sum(1) <= 2).all()
    again = WandaPruning(pattern="2:4")
    module.net.load_state_dict(half.net.state_dict())
    trainer(tmp_path, again, max_steps=0).fit(module, datamodule=SomebodysData())
    assert again.report.method.startswith("already pruned")
    assert all(map(torch.equal, module.net.parameters(), half.net.parameters()))


def test_a_pruned_model_below_the_target_is_pruned_further(tmp_path, caplog):
    module = SomebodysModule()
    prune_model(module.net, token_batches(), Magnitude(), Unstructured(0.3))
    zeros = [p == 0 for p in module.net.parameters()]
    callback = WandaPruning(sparsity=0.5)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, callback, max_steps=0).fit(module, datamodule=SomebodysData())
    assert "it is pruned further" in caplog.text
    assert min(sparsities(module)) == 0.5
    kept = sum(int((p[z] != 0).sum()) for p, z in zip(module.net.parameters(), zeros, strict=True))
    rows_over = sum(int((z.float().mean(1) > 0.5).sum()) for z in zeros if z.dim() == 2)
    assert kept == 0
    assert rows_over > 0  # rows that magnitude had pruned beyond a half stay as they are


def test_a_checkpoint_that_knows_no_callback_is_not_pruned_again(tmp_path, caplog):
    module = SomebodysModule()
    prune_model(module.net, None, Magnitude(), Unstructured(0.5))
    run = trainer(tmp_path, SparseFinetuning())
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    zeros = [p == 0 for p in module.net.parameters()]
    resumed, callback = SomebodysModule(), WandaPruning(sparsity=0.5)
    trainer(tmp_path, callback, max_steps=4).fit(resumed, batches(), ckpt_path=tmp_path / "run.ckpt")
    assert "it is not pruned again" in caplog.text
    assert all(not p[zero].any() for p, zero in zip(resumed.net.parameters(), zeros, strict=True))
    assert callback.report.method.startswith("already pruned")


def test_a_dense_model_is_no_pruned_one(tmp_path, caplog):
    callback = WandaPruning(sparsity=0.5)
    trainer(tmp_path, callback, max_steps=0).fit(SomebodysModule(), batches())
    assert "pruned before" not in caplog.text
    assert callback.report.method == "Wanda(variant=False)"
