"""Sweeps over methods and sparsities, each run against the same pruning done alone."""

import json
from pathlib import Path

import pytest
import torch
from helpers import SomebodysData, SomebodysModule, tiny_llama, token_batches
from helpers import few_windows as data
from helpers import pruning_trainer as trainer
from lightning.pytorch.cli import ArgsType

from wanda_lightning import (
    ATP,
    OWL,
    CausalLM,
    Magnitude,
    Wanda,
    WandaPruning,
    ZeroShotEvaluation,
)
from wanda_lightning.cli.lightning_cli import PruningCLI, run
from wanda_lightning.runs import trials
from wanda_lightning.runs.causal_lm import CausalLM as Module
from wanda_lightning.runs.plotting import metric_of


def perplexities(folder) -> dict[str, float]:
    reports = {file.parent.name: json.loads(file.read_text()) for file in Path(folder).glob("*/pruning.json")}
    return {name: report["evaluations"]["pruned"]["val/perplexity"] for name, report in reports.items()}


def test_each_run_starts_from_the_dense_weights(tiny_model_folder, tmp_path):
    sweeper = trainer(tmp_path / "sweep")
    comparison = sweeper.sweep(CausalLM(tiny_model_folder), data(), [Magnitude(), Wanda()], [0.5], ["1:4"])
    alone = {}
    for sparsity, pattern, name in ((0.5, "unstructured", "wanda-0.5"), (None, "1:4", "wanda-1of4")):
        one = trainer(tmp_path / name, WandaPruning(sparsity, pattern))
        alone[name] = one.prune(CausalLM(tiny_model_folder), data(), save=False).evaluations
    found = perplexities(tmp_path / "sweep")
    assert sorted(found) == ["magnitude-0.5", "magnitude-1of4", "wanda-0.5", "wanda-1of4"]
    assert {name: found[name] for name in alone} == {n: e["pruned"]["val/perplexity"] for n, e in alone.items()}
    rows = comparison.rows()
    assert [row["stage"] for row in rows] == ["dense"] + ["pruned"] * 4
    assert rows[0]["metrics"]["val/perplexity"] == alone["wanda-0.5"]["dense"]["val/perplexity"]
    assert json.loads((tmp_path / "sweep/comparison.json").read_text())["rows"] == rows
    assert (tmp_path / "sweep/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert sweeper.callbacks == trainer(tmp_path).callbacks or len(sweeper.callbacks) == len(
        trainer(tmp_path).callbacks
    )


def test_allocations_are_a_dimension(tiny_model_folder, tmp_path):
    splits = [OWL(factor=2), ATP(0.1)]
    comparison = trainer(tmp_path).sweep(CausalLM(tiny_model_folder), data(), [Magnitude()], [0.5], ["2:4"], splits)
    assert sorted(perplexities(tmp_path)) == [
        "magnitude-0.5",
        "magnitude-0.5-atp",
        "magnitude-0.5-owl",
        "magnitude-2of4",
    ]
    labels = [row["method"] for row in comparison.rows()]
    assert labels == ["", "Magnitude", "Magnitude, OWL(factor=2)", "Magnitude, ATP(beta=0.1)", "Magnitude"]
    assert len({*perplexities(tmp_path).values()}) == 4
    report = json.loads((tmp_path / "magnitude-0.5-owl/pruning.json").read_text())
    assert report["allocation"]["allocator"] == str(splits[0])
    before = (tmp_path / "magnitude-0.5-owl/pruning.json").stat().st_mtime_ns
    trainer(tmp_path).sweep(CausalLM(tiny_model_folder), data(), [Magnitude()], [0.5], ["2:4"], splits)
    assert (tmp_path / "magnitude-0.5-owl/pruning.json").stat().st_mtime_ns == before  # done before


def test_where_nothing_is_logged_nothing_is_pruned(tmp_path):
    module = SomebodysModule()
    with pytest.raises(ValueError, match="validation logs no metric, or is limited to no batches"):
        trainer(tmp_path / "sweep", limit_val_batches=0).sweep(module, SomebodysData(), [Magnitude()], [0.5])
    assert not (tmp_path / "sweep").exists()


def test_a_run_that_found_its_zeros_is_not_done_again(tiny_model_folder, tmp_path):
    """A model that comes with more zeros than a run asks for is evaluated as it is, once."""
    trainer(tmp_path, WandaPruning(0.5)).prune(CausalLM(tiny_model_folder), data(), evaluate=False)
    written = []
    for _ in range(2):
        trainer(tmp_path / "sweep").sweep(CausalLM(tmp_path / "model"), data(), [Magnitude()], [0.3])
        written.append((tmp_path / "sweep/magnitude-0.3/pruning.json").stat().st_mtime_ns)
    assert written[0] == written[1]


def test_a_module_that_logs_no_perplexity(tmp_path):
    comparison = trainer(tmp_path).sweep(SomebodysModule(), SomebodysData(), [Magnitude()], [0.5])
    assert metric_of(comparison, None) == "val_loss"
    assert (tmp_path / "comparison.png").exists()


def test_an_interrupted_sweep_goes_on(tiny_model_folder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    asked = [Magnitude(), Wanda()], [0.3, 0.6], []
    trainer(whole).sweep(CausalLM(tiny_model_folder), data(), *asked)

    calls = []
    original = trials.prune

    def interrupted(*args, **kwargs):
        calls.append("prune")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(trials, "prune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer(parts).sweep(CausalLM(tiny_model_folder), data(), *asked)
    evaluations = []
    monkeypatch.setattr(Module, "on_validation_start", lambda self: evaluations.append(1), raising=False)
    trainer(parts).sweep(CausalLM(tiny_model_folder), data(), *asked)
    assert len(calls) == 3 + 2
    assert len(evaluations) == 2  # of the runs that were left; the dense model's was kept
    assert perplexities(parts) == perplexities(whole)
    assert (parts / "comparison.md").read_text() == (whole / "comparison.md").read_text()


def test_what_was_done_there_before_stays_in_the_table(tiny_model_folder, tmp_path):
    for method in (Magnitude(), Wanda()):
        comparison = trainer(tmp_path).sweep(CausalLM(tiny_model_folder), data(), [method], [0.5])
    assert [row["method"] for row in comparison.rows()] == ["", "Wanda", "Magnitude"]


@pytest.mark.parametrize("stages", [{"dense": {"val/perplexity": 1.0}, "pruned": {}}, {}])
def test_runs_that_no_sweep_made_or_that_broke_off_are_left_out(tiny_model_folder, tmp_path, stages):
    for method in (Magnitude(), Wanda()):
        comparison = trainer(tmp_path).sweep(CausalLM(tiny_model_folder), data(), [method], [0.5])
        file = tmp_path / "magnitude-0.5/pruning.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"evaluations": stages}))
    assert [row["method"] for row in comparison.rows()] == ["", "Wanda"]


def test_the_folder_of_another_sweep_is_refused(tiny_model_folder, tmp_path):
    trainer(tmp_path).sweep(CausalLM(tiny_model_folder), data(), [Magnitude()], [0.5])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"holds another sweep.*data\.seed: 0 there, 1 now.*or delete this one"):
        trainer(tmp_path).sweep(CausalLM(tiny_model_folder), data(seed=1), [Magnitude()], [0.5])
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_folder_that_one_of_the_runs_cannot_have_is_found_before_the_first(tiny_model_folder, tmp_path):
    """A name says no settings where the method is the only one of its kind."""
    trainer(tmp_path).sweep(CausalLM(tiny_model_folder), data(), [Wanda()], [0.5])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"wanda-0\.5 holds .* another run: method.*refine=1.*, or delete this one$"):
        trainer(tmp_path).sweep(CausalLM(tiny_model_folder), data(), [Magnitude(), Wanda(refine=1)], [0.5])
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_sweep_evaluated_in_another_way_is_another_sweep(tiny_model_folder, tmp_path):
    """Figures of two data types, or with and without zero-shot tasks, must not end in one table."""
    asked = [Magnitude()], [0.5]
    trainer(tmp_path).sweep(CausalLM(tiny_model_folder), data(), *asked)
    with pytest.raises(ValueError, match=r"another sweep.*model\.dtype: 'auto' there, 'bfloat16' now\. Choose"):
        trainer(tmp_path).sweep(CausalLM(tiny_model_folder, dtype="bfloat16"), data(), *asked)
    with pytest.raises(ValueError, match=r"another sweep.*trainer\.limit_val_batches: None there, 1 now\. Choose"):
        trainer(tmp_path, limit_val_batches=1).sweep(CausalLM(tiny_model_folder), data(), *asked)
    callback = ZeroShotEvaluation(["builtin_continuation"], limit=2)
    with pytest.raises(ValueError, match=r"another sweep.*zero_shot\.tasks: None there, \['builtin_con.* now"):
        trainer(tmp_path, callback).sweep(CausalLM(tiny_model_folder), data(), *asked)


def start(what: str, folder: Path, module, data, **settings) -> None:
    asked = {"sweep": {"methods": ["wanda"]}, "search": {"max_perplexity_increase": 0.1}}
    run = trainer(folder, *[WandaPruning()] * (what == "search"), **settings)
    getattr(run, what)(module, data, **asked[what])


@pytest.mark.parametrize("what", ["sweep", "search"])
def test_figures_of_a_fast_dev_run_are_not_kept_for_a_whole_one(tmp_path, what):
    with pytest.raises(ValueError, match=f"a {what} compares whole evaluations: leave fast_dev_run out"):
        start(what, tmp_path / "run", SomebodysModule(), SomebodysData(), fast_dev_run=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["sweep", "search"])
def test_what_is_no_module_or_no_datamodule_is_refused(tmp_path, what):
    with pytest.raises(ValueError, match=r"model must be a LightningModule, .* got a LlamaForCausalLM"):
        start(what, tmp_path, tiny_llama(), SomebodysData())
    with pytest.raises(ValueError, match="datamodule must be a LightningDataModule, got list"):
        start(what, tmp_path, SomebodysModule(), token_batches())


def test_zero_shot_results_of_each_run_stand_beside_its_report(tiny_model_folder, tmp_path):
    callback = ZeroShotEvaluation(["builtin_continuation"], limit=4)
    comparison = trainer(tmp_path, callback).sweep(CausalLM(tiny_model_folder), data(), [Magnitude(), Wanda()], [0.9])
    for each in comparison.runs:
        written = json.loads((each.folder / "zero_shot/pruned.json").read_text())
        found = written["results"]["builtin_continuation"]["acc,none"]
        assert each.evaluations["pruned"]["val/zero_shot/builtin_continuation/acc"] == pytest.approx(found)
    assert [file.name for file in (tmp_path / "zero_shot").iterdir()] == ["validate.json"]  # of the dense model


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (([], [0.5], []), r"needs methods.*got methods \[\]"),
        (([Wanda()], [], []), r"needs methods, and sparsities.*sparsities \[\], patterns \[\]"),
        (([Wanda(), "wanda"], [0.5], []), "each of them once"),
        ((["wonda"], [0.5], []), "method must be one of magnitude, wanda, .*got 'wonda'"),
        (([Wanda()], [0.5, 0.5], []), "each of them once"),
        (([Wanda()], [1.5], []), r"\[0, 1\)"),
        (([Wanda()], [], ["4:2"]), "4:2"),
        (("wanda", [0.5], []), "methods must be a list, got 'wanda'"),
        (([Wanda()], 0.5, []), r"sparsities must be a list, got 0\.5"),
        (([Wanda()], [], "2:4"), "patterns must be a list, got '2:4'"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).sweep(CausalLM("no-such-model"), data(), *asked)


def test_a_pruning_callback_beside_a_sweep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="brings its own pruning callbacks"):
        trainer(tmp_path, WandaPruning()).sweep(CausalLM("no-such-model"), data(), [Wanda()])


def command(folder, model, *more: str) -> ArgsType:
    recipe = Path(__file__).parents[2] / "wanda_lightning/recipes/sweep.yaml"
    return [
        "sweep", "-c", str(recipe), f"--model.pretrained={model}", f"--trainer.default_root_dir={folder}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.num_samples=4",
        "--data.sequence_length=16", "--data.max_evaluation_windows=4", *more,
    ]  # fmt: skip


def test_the_recipe(tiny_model_folder, tmp_path, capsys):
    cli = run(command(tmp_path, tiny_model_folder, "--sparsities=[0.25, 0.5]"))
    assert isinstance(cli, PruningCLI)
    assert len(perplexities(tmp_path)) == 9
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("Magnitude", "Wanda", "SparseGPT", "2:4", "comparison.png"))


def test_methods_by_the_names_that_prune_takes(tiny_model_folder, tmp_path):
    run(command(tmp_path, tiny_model_folder, "--methods=[wanda, Magnitude]", "--sparsities=[0.5]", "--patterns=[]"))
    assert {*perplexities(tmp_path)} == {"wanda-0.5", "magnitude-0.5"}


def test_weights_are_brought_back_whatever_the_method_did(tiny_model_folder, tmp_path):
    """SparseGPT changes kept weights too; magnitude after it must see none of that."""
    from wanda_lightning import SparseGPT

    model, plain = CausalLM(tiny_model_folder), CausalLM(tiny_model_folder)
    trainer(tmp_path / "a").sweep(model, data(), [SparseGPT(), Magnitude()], [0.5])
    trainer(tmp_path / "b").sweep(plain, data(), [Magnitude()], [0.5])
    assert all(map(torch.equal, model.model.state_dict().values(), plain.model.state_dict().values()))
