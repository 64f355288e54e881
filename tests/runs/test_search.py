"""A search for a budget, against looking at every sparsity, and against pruning to what it found."""

import json
from io import StringIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SomebodysModule, digests, tiny_llama, token_batches
from helpers import few_windows as data
from helpers import pruning_trainer as trainer
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch.utils.data import DataLoader

from wanda_lightning import (
    OWL,
    CausalLM,
    LeastLoss,
    Magnitude,
    MagnitudePruning,
    SparseGPTPruning,
    TextDataModule,
    WandaPruning,
    WidthPruning,
    ZeroShotEvaluation,
    compress,
)
from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.callbacks.plumbing.run_identity import describe_settings
from wanda_lightning.callbacks.pruning import at_sparsity
from wanda_lightning.data.builtin_text import BuiltinText
from wanda_lightning.runs import trials
from wanda_lightning.runs.budget import Budget, budget_of
from wanda_lightning.runs.held_out import HeldOut
from wanda_lightning.runs.search_result import SearchResult, Trial

STEP = 0.125  # of 32 inputs every sparsity prunes as many as it says


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory) -> Path:
    """A tiny model that has learned a little, so that pruning harms it."""
    folder = tmp_path_factory.mktemp("trained")
    model = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loader = TextDataModule(tokenizer=tokenizer, sequence_length=32, batch_size=16).train_dataloader()
    for batch in islice(loader, 120):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def every(trained, tmp_path_factory) -> list[float]:
    """Perplexities of the dense model and of all sparsities, on what is held out: a fine sweep."""
    folder = tmp_path_factory.mktemp("every")
    asked = [STEP * number for number in range(1, 8)]
    trainer(folder).sweep(CausalLM(trained), HeldOut(data(), 8), [Magnitude()], asked)
    reports = [json.loads((folder / f"magnitude-{sparsity:g}/pruning.json").read_text()) for sparsity in asked]
    stages = [(reports[0], "dense"), *((report, "pruned") for report in reports)]
    return [report["evaluations"][stage]["val/perplexity"] for report, stage in stages]


@pytest.mark.parametrize("budget", [1e-4, 0.012, 0.05, 1.0])
def test_it_finds_what_a_sweep_over_all_sparsities_shows(trained, tmp_path, every, budget):
    kept = [perplexity <= (1 + budget) * every[0] for perplexity in every] + [False]
    ends = [number for number in range(8) if kept[number] and not kept[number + 1]]
    asked = {"max_perplexity_increase": budget, "step": STEP, "held_out_windows": 8}
    searcher = trainer(tmp_path, MagnitudePruning())
    if budget < 1e-3:  # where the smallest sparsity is too much
        assert 0 in ends
        with pytest.raises(ValueError, match="budget cannot be met, even the smallest"):
            searcher.search(CausalLM(trained), data(), **asked)
        return
    result = searcher.search(CausalLM(trained), data(), **asked)
    assert result.found in [STEP * number for number in ends]
    for trial in result.trials:
        assert trial.metrics["val/perplexity"] == every[round(trial.sparsity / STEP)]
        assert trial.zeros == trial.sparsity
    assert result.dense["val/perplexity"] == every[0]


def test_it_ends_with_the_model_that_prune_makes(trained, tmp_path):
    """SparseGPT changes kept weights too: none of that may be left from one trial to the next."""
    searcher = trainer(tmp_path / "found", SparseGPTPruning(ignore=["o_proj"]))
    result = searcher.search(CausalLM(trained), data(), max_perplexity_increase=0.5, step=STEP)
    assert searcher.search_result is result
    assert searcher.pruning_callback.pattern.sparsity == result.found
    pruner = trainer(tmp_path / "pruned", SparseGPTPruning(result.found, ignore=["o_proj"]))
    report = pruner.prune(CausalLM(trained), data())
    assert digests(tmp_path / "found/model") == digests(tmp_path / "pruned/model")
    assert result.final == report.evaluations
    assert json.loads((tmp_path / "found/pruning.json").read_text())["evaluations"] == report.evaluations
    assert SearchResult.from_dict(json.loads((tmp_path / "found/search.json").read_text())) == result
    assert (tmp_path / "found/search.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "found/search.md").read_text()
    assert all(f"{value['val/perplexity']:.4g}" in table for value in result.final.values())
    assert table.count("found |") == 1
    assert len(table.split("\n\n")[0].splitlines()) == 3 + len(result.trials)


def test_the_evaluation_set_is_not_read_before_the_end(trained, tmp_path, monkeypatch):
    events = []
    text, prune_and_evaluate = BuiltinText.text, trials.prune_and_evaluate
    monkeypatch.setattr(BuiltinText, "text", lambda self, split, tokenizer: events.append(split) or text(self, split))
    monkeypatch.setattr(
        "wanda_lightning.runs.search.prune_and_evaluate", lambda *args: (prune_and_evaluate(*args), events.append(1))[0]
    )
    asked = {"max_perplexity_increase": 0.5, "step": STEP}
    trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), **asked)
    first, last = events.index("evaluation"), len(events) - 1 - events[::-1].index(1)
    assert events.count(1) >= 2
    assert last < first


def test_what_is_evaluated_how_often(trained, tmp_path, monkeypatch):
    """The dense model and each trial once on what is held out; in the end both models on the evaluation set."""
    seen, read, loader = [], [], TextDataModule.held_out_dataloader
    monkeypatch.setattr(
        CausalLM, "on_validation_start", lambda self: seen.append(type(self.trainer.datamodule)), raising=False
    )
    monkeypatch.setattr(
        TextDataModule, "held_out_dataloader", lambda self, most: read.append(most) or loader(self, most)
    )
    asked = {"max_perplexity_increase": 0.5, "step": STEP}
    result = trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), **asked)
    assert seen == [HeldOut] * (1 + len(result.trials)) + [TextDataModule] * 2
    assert len(read) == 1


def test_a_search_that_is_done_is_not_done_again(trained, tmp_path, monkeypatch):
    asked = {"max_perplexity_increase": 0.1, "step": STEP}
    first = trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), **asked)
    calls, prune_and_evaluate = [], trials.prune_and_evaluate
    monkeypatch.setattr(
        "wanda_lightning.runs.search.prune_and_evaluate",
        lambda *args: calls.append(args[-1].pattern.sparsity) or prune_and_evaluate(*args),
    )
    assert trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), **asked) == first
    assert calls == []

    asked["max_perplexity_increase"] = 10.0  # another budget has the same trials, but leads to another model
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"another run or of another budget.*overwrite"):
        trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), **asked)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    second = trainer(tmp_path, WandaPruning(overwrite=True)).search(CausalLM(trained), data(), **asked)
    assert second.found > first.found
    assert set(calls).isdisjoint(trial.sparsity for trial in first.trials)
    assert len(second.trials) == len(first.trials) + len(calls)


def test_the_folder_of_another_search_is_refused(trained, tmp_path):
    asked = {"max_perplexity_increase": 0.5, "step": 0.5}
    trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), **asked)
    for callback, seed, what in (
        (WandaPruning(), 1, r"data\.seed: 0 there, 1 now"),
        (WandaPruning(ignore=["o_proj"]), 0, r"pruning\.ignore: None there, \['o_proj'\] now"),
    ):
        with pytest.raises(ValueError, match=f"holds another search.*{what}.*--overwrite"):
            trainer(tmp_path, callback).search(CausalLM(trained), data(seed=seed), **asked)


def test_trials_of_another_search_do_not_stay(trained, tmp_path):
    (tmp_path / "trials/0.75").mkdir(parents=True)
    (tmp_path / "trials/0.75/pruning.json").write_text("{}")
    asked = {"max_perplexity_increase": 0.5, "step": 0.5}
    found = trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), **asked)
    assert [trial.name for trial in (tmp_path / "trials").iterdir()] == [f"{found.trials[0].sparsity:g}"]


def test_a_trial_has_all_settings_but_the_sparsity():
    settings = {"targets": ["q_proj"], "allocation": {"*.0.*": 0.25}, "true_sequential": True, "activations": "cpu"}
    callback = WandaPruning(0.25, variant=True, **settings)
    trial = at_sparsity(callback, 0.75, "trials/0.75")
    assert describe_settings(trial) == describe_settings(callback) | {"sparsity": 0.75}
    assert (trial.activations, trial.output_dir, trial.run.asked) == ("cpu", "trials/0.75", trial)
    assert callback.pattern.sparsity == 0.25
    assert callback.run is not trial.run


@pytest.mark.parametrize("callback", [WandaPruning, MagnitudePruning])
def test_the_file_is_no_larger_than_asked_for(trained, tmp_path, callback):
    """And with a step less it would be."""
    result = trainer(tmp_path, callback()).search(CausalLM(trained), data(), max_bytes=130_000, step=0.0625)
    written = compress(str(tmp_path / "model"), str(tmp_path / "small")).written
    assert result.trial(result.found).metrics == {"bytes": written}
    assert written <= 130_000
    assert list(result.final) == ["dense", "pruned"]
    less = trainer(tmp_path / "less", callback(result.found - 0.0625))
    less.prune(CausalLM(trained), data(), evaluate=False)
    assert compress(str(tmp_path / "less/model"), str(tmp_path / "large")).written > 130_000


def test_a_size_that_was_calculated_too_small_is_mended(trained, tmp_path, monkeypatch):
    """As where experts are saved one by one: what counts is the file."""
    monkeypatch.setattr("wanda_lightning.runs.size_search.CompressedSize.expected", lambda *_: 120_000)
    _calculate(monkeypatch, [200_000, 190_000, 125_000, 124_000, 110_000])
    searcher = trainer(tmp_path, WandaPruning())
    result = searcher.search(CausalLM(trained), data(), max_bytes=125_000, step=0.2)
    written = compress(str(tmp_path / "model"), str(tmp_path / "small")).written
    assert (result.found, result.trial(0.6).metrics["bytes"]) == (0.6, written)
    assert written <= 125_000


def _calculate(monkeypatch, sizes):
    trials = [Trial(number / len(sizes), 0.0, {"bytes": size}) for number, size in enumerate(sizes)]
    monkeypatch.setattr("wanda_lightning.runs.size_search._calculated", lambda *_: trials)


def test_zeros_that_were_calculated_are_those_of_a_pruning(trained, tmp_path):
    """Of 32 inputs 0.1 are 3, and an allocation says how much of some linears goes, whatever is tried."""
    asked = {"allocation": {"*down_proj": 0.25}}
    searcher = trainer(tmp_path, WandaPruning(**asked))
    trial = searcher.search(CausalLM(trained), data(), max_bytes=140_000, step=0.1).trial(0.1)
    less = trainer(tmp_path / "less", WandaPruning(0.1, **asked))
    report = less.prune(CausalLM(trained), data(), evaluate=False, save=False)
    assert trial.zeros == pytest.approx(report.sparsity)


def test_what_an_allocation_cannot_split_is_over_the_budget(trained, tmp_path):
    callback = WandaPruning(allocation=LeastLoss(rounds=1))  # no linear loses more than 95 %
    result = trainer(tmp_path, callback).search(CausalLM(trained), data(), max_perplexity_increase=100, step=0.24)
    assert (result.found, [trial.sparsity for trial in result.trials]) == (0.72, [0.48, 0.72])


def test_a_budget_that_needs_what_an_allocation_cannot_split(trained, tmp_path):
    asked = {"max_perplexity_increase": 1e-6, "step": 0.02}
    with pytest.raises(ValueError, match=r"the budget cannot be met, 2 % cannot be tried: OWL.* sparsity of -0\."):
        trainer(tmp_path, WandaPruning(allocation=OWL(spread=0.3))).search(CausalLM(trained), data(), **asked)


def test_a_size_is_searched_for_on_after_a_crash(trained, tmp_path, monkeypatch):
    """After the first of two prunings, and after the second."""
    _calculate(monkeypatch, [200_000, 125_000, 124_000])
    measured = iter([KeyboardInterrupt, 130_000, KeyboardInterrupt, 130_000, 120_000])

    def measure(trainer):
        if (size := next(measured)) is KeyboardInterrupt:
            raise size
        return size

    monkeypatch.setattr("wanda_lightning.runs.size_search._measured", measure)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), max_bytes=125_000, step=0.4)
    result = trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), max_bytes=125_000, step=0.4)
    assert (result.found, result.trial(0.8).metrics) == (0.8, {"bytes": 120_000})
    assert json.loads((tmp_path / "pruning.json").read_text())["target_sparsity"] == 0.8


@pytest.mark.parametrize(
    ("size", "message"),
    [(1e9, "fits as it is: its weights take"), (1000, "at the largest sparsity, 50 %, the weights")],
)
def test_sizes_that_need_no_pruning_or_cannot_be(trained, tmp_path, size, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, WandaPruning()).search(CausalLM(trained), data(), max_bytes=size, step=0.5)
    assert not (tmp_path / "model").exists()


def test_zero_shot_tasks_with_their_errors(trained, tmp_path):
    callbacks = WandaPruning(), ZeroShotEvaluation(["builtin_continuation"], limit=20)
    asked = {"metric": "mean/acc", "max_drop": 0.3, "step": 0.25}
    result = trainer(tmp_path, *callbacks).search(CausalLM(trained), data(), **asked)
    name = "val/zero_shot/mean/acc"
    assert all({name, f"{name}_stderr"} <= trial.metrics.keys() for trial in result.curve())
    assert all(trial.metrics[name] >= result.dense[name] - 0.3 for trial in result.trials if result.is_kept(trial))
    assert "same questions chose its sparsity" in (tmp_path / "search.md").read_text()
    assert " ± " in (tmp_path / "search.md").read_text()


def test_tasks_are_not_evaluated_in_a_search_for_a_perplexity(trained, tmp_path):
    callbacks = WandaPruning(), ZeroShotEvaluation(["builtin_continuation"], limit=4)
    asked = {"max_perplexity_increase": 10.0, "step": 0.5}
    result = trainer(tmp_path, *callbacks).search(CausalLM(trained), data(), **asked)
    assert [*result.dense] == ["val/perplexity", "val/tokens"]
    assert "val/zero_shot/mean/acc" in result.final["pruned"]


def found(dense: float, *values: float, error: float = 0.02, most: float = 0.05) -> SearchResult:
    """A search in which the accuracy of the dense model and of some sparsities is known."""
    metrics = [{"val/acc": value, "val/acc_stderr": error} for value in (dense, *values)]
    trials = [Trial(0.1 * (1 + at), 0.1 * (1 + at), each) for at, each in enumerate(metrics[1:])]
    result = SearchResult(Budget("acc", "drop", most), {}, metrics[0], trials)
    result.found = max((trial.sparsity for trial in trials if result.is_kept(trial)), default=None)
    return result


def test_differences_within_the_noise_are_said_to_be():
    """Two errors of 0.02 make one of 0.028; twice that is 0.057."""
    near, far = found(0.6, 0.56), found(0.6, 0.5, most=0.12)
    assert any("difference from the dense model is within twice the standard error" in note for note in near.notes())
    assert not any("difference from the dense model" in note for note in far.notes())
    assert near.may_be_noise(near.trials[0])
    assert [near.may_be_noise(trial) for trial in found(0.6, 0.5, 0.4, 0.56, 0.61).trials] == [True, False, True, False]
    exact = found(0.6, 0.56, error=0.0)
    assert not any("noise" in note for note in exact.notes())


def test_notes_on_the_terminal_are_no_markup():
    result = SearchResult(Budget("acc[top]", "drop", 0.1), {}, {"acc[top]": 0.6}, [Trial(0.5, 0.5, {"acc[top]": 0.55})])
    result.found = 0.5
    console = Console(width=400, file=StringIO())
    console.print(result.to_table())
    assert f"Note: {result.notes()[0]}." in console.file.getvalue()


def test_the_end_of_a_search_by_a_metric_that_the_dense_model_has_at_0():
    result = SearchResult(Budget("errors", "rise", 0.1), {}, {"val/errors": 0.0})
    result.final = {"dense": {"val/errors": 0.0}, "pruned": {"val/errors": 0.05}}
    assert result.notes() == ["on the evaluation set, which chose nothing: errors 0 dense, 0.05 pruned (+0.05)"]


def test_a_curve_that_turns_is_said_to():
    assert any("gets better again" in note for note in found(0.6, 0.5, 0.58, 0.4).notes())
    assert not any("gets better again" in note for note in found(0.6, 0.58, 0.5, 0.4).notes())


def batches(count: int, seed: int = 1) -> DataLoader:
    return DataLoader(token_batches(count, batch_size=1, seed=seed), batch_size=None)


class TheirData(LightningDataModule):
    """Token ids, and no tokenizer."""

    def calibration_dataloader(self):
        return batches(2)

    def held_out_dataloader(self, max_windows):
        return batches(max_windows, seed=2)

    def train_dataloader(self):
        return batches(2)

    def val_dataloader(self):
        return batches(2, seed=3)


def test_held_out_batches_pass_through_the_hooks_of_the_datamodule(tmp_path):
    class Backwards(TheirData):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch.flip(1)

    model = SomebodysModule()
    (found,) = trainer(tmp_path).validate(model, HeldOut(Backwards(), 3), verbose=False)
    backwards = DataLoader([batch.flip(1) for batch in batches(3, seed=2)], batch_size=None)
    (expected,) = trainer(tmp_path).validate(model, backwards, verbose=False)
    assert found["val_loss"] == expected["val_loss"]


def test_a_module_may_ask_its_datamodule_for_anything_in_a_trial_too(tmp_path):
    class Scaled(SomebodysModule):
        def validation_step(self, batch, batch_idx):
            self.log("scaled", torch.tensor(self.trainer.datamodule.scale))

    data = TheirData()
    data.scale = 3.0
    (found,) = trainer(tmp_path).validate(Scaled(), HeldOut(data, 3), verbose=False)
    assert found["scaled"] == 3.0
    assert not hasattr(HeldOut(data, 3), "tokenizer")


def test_any_module_and_any_metric(tmp_path):
    model = SomebodysModule()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {"metric": "val_loss", "max_rise": 2.0, "step": 0.25, "held_out_windows": 3}
    result = trainer(tmp_path, WandaPruning()).search(model, TheirData(), **asked)
    trial = result.trial(result.found)
    assert trial.metrics["val_loss"] <= result.dense["val_loss"] + 2
    model.load_state_dict(dense)
    (expected,) = trainer(tmp_path / "alone").validate(model, batches(3, seed=2), verbose=False)
    assert result.dense["val_loss"] == pytest.approx(expected["val_loss"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "needs one budget.*got none"),
        ({"max_perplexity_increase": 0.1, "max_bytes": 5}, "one budget.*max_perplexity_increase=0.1, max_bytes=5"),
        ({"metric": "acc"}, "metric with max_drop or max_rise"),
        ({"max_drop": 0.1}, "metric with max_drop or max_rise"),
        ({"metric": "acc", "max_bytes": 5}, "one budget"),
        ({"max_perplexity_increase": -0.1}, "a budget must be a finite number of at least 0, got -0.1"),
        ({"max_perplexity_increase": float("nan")}, "a budget must be a finite number of at least 0, got nan"),
        ({"max_perplexity_increase": "10%"}, "a budget must be a finite number of at least 0, got '10%'"),
        ({"max_perplexity_increase": 0.1, "step": 0.0}, r"step must be a sparsity in \(0, 0.5\], got 0.0"),
        ({"max_perplexity_increase": 0.1, "held_out_windows": 0}, "held_out_windows"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, WandaPruning()).search(CausalLM("no-such-model"), data(), **asked)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "one pruning callback such as WandaPruning, got 0"),
        ([WandaPruning(), MagnitudePruning()], "got 2"),
        ([WandaPruning(pattern="2:4")], "leave pattern and schedule out, got pattern='2:4'"),
        ([WandaPruning(schedule=Gradual(0, 4))], r"leave pattern and schedule out, got .*schedule=Gradual\(start=0"),
        ([WandaPruning(), WidthPruning()], "their shapes have to stay: make the model smaller first"),
    ],
)
def test_what_has_no_sparsity_to_choose_is_refused(tmp_path, callbacks, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, *callbacks).search(CausalLM("no-such-model"), data(), max_perplexity_increase=0.1)


def test_a_streamed_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a search keeps the dense weights in memory, and stream leaves them on disk"):
        trainer(tmp_path, WandaPruning()).search(CausalLM("no-model", stream=True), data(), max_perplexity_increase=0.1)


def test_a_metric_that_is_no_number_for_the_dense_model_is_refused(tmp_path):
    class Undefined(SomebodysModule):
        def validation_step(self, batch, batch_idx):
            self.log("share", torch.tensor(torch.nan))

    with pytest.raises(ValueError, match="share of the dense model is nan: nothing compares"):
        trainer(tmp_path, WandaPruning()).search(Undefined(), TheirData(), metric="share", max_rise=0.1)


@pytest.mark.parametrize("most", [np.float32(0.1), np.float64(0.1)])
def test_budgets_of_numpy_are_pythons(most):
    assert str(budget_of(max_perplexity_increase=most)) == "perplexity at most 10 % over the dense model's"
    assert budget_of(max_bytes=np.int64(5)) == budget_of(max_bytes=5)


def test_a_datamodule_that_holds_nothing_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"give the datamodule a held_out_dataloader.*got LightningDataModule"):
        trainer(tmp_path, WandaPruning()).search(
            CausalLM("no-such-model"), LightningDataModule(), max_perplexity_increase=0.1
        )


def test_a_metric_that_is_not_logged_ends_it_before_a_weight_changes(trained, tmp_path):
    module = CausalLM(trained)
    with pytest.raises(ValueError, match=r"no metric 'arc/acc' was logged; there are val/perplexity"):
        trainer(tmp_path, WandaPruning()).search(module, data(), metric="arc/acc", max_drop=0.1)
    dense = CausalLM(trained)
    dense.configure_model()
    assert all(map(torch.equal, module.model.state_dict().values(), dense.model.state_dict().values()))


@pytest.mark.parametrize("metric", ["foo", "continuation/foo"])
def test_a_metric_that_is_not_logged_ends_it_before_the_evaluation(trained, tmp_path, monkeypatch, metric):
    seen = []
    step = CausalLM.validation_step
    monkeypatch.setattr(CausalLM, "validation_step", lambda *a, **k: (step(*a, **k), seen.append(1))[0])
    callbacks = WandaPruning(), ZeroShotEvaluation(["builtin_continuation"], limit=20)
    with pytest.raises(ValueError, match="val/perplexity, val/tokens, val/zero_shot/builtin_continuation/acc"):
        trainer(tmp_path, *callbacks).search(CausalLM(trained), data(), metric=metric, max_drop=0.1)
    assert len(seen) == 1
    assert not [*tmp_path.iterdir()]


def test_a_metric_is_known_by_the_end_of_its_name():
    names = [f"val/zero_shot/{task}/acc" for task in ("a", "b", "aa")]
    assert budget_of(metric="a/acc", max_drop=0.1).name(dict.fromkeys(names, 1.0)) == names[0]
    with pytest.raises(ValueError, match="2 metrics end in 'acc'; there are a/acc, b/acc"):
        budget_of(metric="acc", max_drop=0.1).name({"a/acc": 1.0, "b/acc": 1.0})
