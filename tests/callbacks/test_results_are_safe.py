"""Results of a run: where they lie, that they name their model, and that a later run does not spoil them."""

import hashlib
import json
from unittest.mock import Mock

import pytest
import torch
from helpers import SomebodysData, SomebodysModule, tiny_llama, trainer
from helpers import few_windows as data
from lightning.pytorch import Callback

from wanda_lightning import CausalLM, ZeroShotEvaluation
from wanda_lightning.callbacks import WandaPruning, WidthPruning
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.runs import one_shot
from wanda_lightning.runs.trainer import PruningTrainer


def contents(folder) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(folder, module=None, save=True, **settings):
    return trainer(folder, WandaPruning(**settings), cls=PruningTrainer).prune(
        module or SomebodysModule(), SomebodysData(), save=save
    )


def test_with_output_dir_everything_lies_there(tmp_path, tiny_model_folder):
    callback = WandaPruning(sparsity=0.5, output_dir=str(tmp_path / "mine"))
    zero_shot = ZeroShotEvaluation(["builtin_continuation"], limit=2)
    one = trainer(tmp_path / "logs", callback, zero_shot, cls=PruningTrainer)
    one.prune(CausalLM(tiny_model_folder), data())
    written = {path.name for path in (tmp_path / "mine").iterdir()}
    assert written == {"pruning.json", "pruning.md", "report.html", "model", "zero_shot"}
    assert {path.name for path in (tmp_path / "mine/zero_shot").iterdir()} == {"dense.json", "pruned.json"}
    assert not (tmp_path / "logs").exists() or not [*(tmp_path / "logs").iterdir()]


def test_a_model_that_comes_with_zeros_has_one_stage_name_everywhere(tmp_path, tiny_model_folder):
    trainer(tmp_path / "a", WandaPruning(sparsity=0.3), cls=PruningTrainer).prune(CausalLM(tiny_model_folder), data())
    zero_shot = ZeroShotEvaluation(["builtin_continuation"], limit=2)
    two = trainer(tmp_path / "b", WandaPruning(sparsity=0.5), zero_shot, cls=PruningTrainer)
    report = two.prune(CausalLM(tmp_path / "a/model"), data())
    assert list(report.evaluations) == ["as loaded", "pruned"]
    assert {path.name for path in (tmp_path / "b/zero_shot").iterdir()} == {"as loaded.json", "pruned.json"}


@pytest.mark.parametrize(("step", "number"), [("_evaluate", 1), ("_evaluate", 2), ("save_pretrained", 1)])
def test_a_run_that_fails_leaves_the_results_of_the_one_before(tmp_path, monkeypatch, step, number):
    run(tmp_path, sparsity=0.5)
    before, calls, original = contents(tmp_path), [], getattr(one_shot, step)

    def fails(*args):
        calls.append(step)
        if len(calls) == number:
            raise OSError("the disk is full")
        original(*args)

    monkeypatch.setattr(one_shot, step, fails)
    with pytest.raises(OSError, match="the disk is full"):
        run(tmp_path, sparsity=0.75, overwrite=True)
    assert {name: digest for name, digest in contents(tmp_path).items() if "unfinished" not in name} == before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sparsity": 0.75}, "sparsity: 0.5 there, 0.75 now"),
        ({"ignore": ["q_proj"]}, "ignore: None there, "),
        ({"true_sequential": True}, "true_sequential: None there, True now"),
    ],
)
def test_results_of_other_settings_are_not_overwritten_silently(tmp_path, settings, named):
    run(tmp_path, sparsity=0.5)
    before, module = contents(tmp_path), SomebodysModule()
    with pytest.raises(ValueError, match=f"(?s){named}.*overwrite=True"):
        run(tmp_path, module, **settings)
    assert contents(tmp_path) == before
    assert all(map(torch.equal, module.parameters(), SomebodysModule().parameters()))
    run(tmp_path, overwrite=True, **settings)
    assert contents(tmp_path)["pruning.json"] != before["pruning.json"]


def test_results_of_another_model_are_not_overwritten_silently(tmp_path):
    run(tmp_path, sparsity=0.5)
    before, other = contents(tmp_path), SomebodysModule()
    other.net = tiny_llama(layers=3)
    with pytest.raises(ValueError, match=r"parameters: .* there, .* now"):
        run(tmp_path, other, sparsity=0.5)
    assert contents(tmp_path) == before


class Evaluated(Callback):
    def on_validation_batch_start(self, *_):
        raise AssertionError("a batch was evaluated")


def test_results_of_other_data_are_refused_before_anything_is_evaluated(tmp_path, tiny_model_folder):
    first = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer)
    first.prune(CausalLM(tiny_model_folder), data(), save=False)
    again = trainer(tmp_path, WandaPruning(sparsity=0.5), Evaluated(), cls=PruningTrainer)
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        again.prune(CausalLM(tiny_model_folder), data(seed=1))


def test_the_same_run_again_replaces_its_results(tmp_path):
    run(tmp_path, sparsity=0.5)
    before = contents(tmp_path)
    (tmp_path / "pruning.md").unlink()
    run(tmp_path, sparsity=0.5)
    assert contents(tmp_path).keys() == before.keys()
    assert contents(tmp_path)["model/model.safetensors"] == before["model/model.safetensors"]


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_a_fast_dev_run_leaves_the_results_of_the_one_before(tmp_path, sparsity):
    run(tmp_path, sparsity=0.5)
    before = contents(tmp_path)
    trainer(tmp_path, WandaPruning(sparsity=sparsity), fast_dev_run=True).fit(SomebodysModule(), SomebodysData())
    assert contents(tmp_path) == before


def test_a_fast_dev_run_of_prune_leaves_the_model_of_the_one_before(tmp_path):
    run(tmp_path, sparsity=0.5)
    before = contents(tmp_path)
    one = trainer(tmp_path, WandaPruning(sparsity=0.75), cls=PruningTrainer, fast_dev_run=True)
    one.prune(SomebodysModule(), SomebodysData())
    assert contents(tmp_path) == before


def test_a_fast_dev_run_has_no_results(tmp_path):
    trainer(tmp_path, WandaPruning(sparsity=0.5), fast_dev_run=True).fit(SomebodysModule(), SomebodysData())
    assert contents(tmp_path) == {}


def test_every_page_names_the_model(tmp_path, tiny_model_folder):
    module = CausalLM(tiny_model_folder)
    report = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer).prune(module, data())
    count = sum(p.numel() for p in module.model.parameters())
    assert report.model == {"name": str(tiny_model_folder), "parameters": count, "dtype": "float32"}
    for page in ("pruning.md", "report.html", "pruning.json"):
        assert str(tiny_model_folder) in (tmp_path / page).read_text()
    assert f"{count:,} parameters" in (tmp_path / "model/README.md").read_text()
    assert f"{count:,} parameters" in (tmp_path / "pruning.md").read_text()


@pytest.mark.parametrize(("precision", "named"), [("bf16-true", "bfloat16"), ("bf16-mixed", "float32, bf16-mixed")])
def test_results_in_another_precision_are_not_replaced(tmp_path, precision, named):
    run(tmp_path, sparsity=0.5, save=False)
    half = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer, precision=precision)
    with pytest.raises(ValueError, match=f"dtype: 'float32' there, '{named}' now"):
        half.prune(SomebodysModule(), SomebodysData(), save=False)


def test_a_report_of_an_older_version_loads_and_is_compared_by_what_it_says(tmp_path):
    report = run(tmp_path, sparsity=0.5, save=False)
    plain = {key: value for key, value in report.to_dict().items() if key not in ("model", "settings")}
    assert PruningReport.from_dict(plain).model == {}
    (tmp_path / "pruning.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"sparsity: 0\.5 there, 0\.75 now"):
        run(tmp_path, sparsity=0.75)
    run(tmp_path, sparsity=0.5, save=False)


@pytest.mark.parametrize("kinds", [(WandaPruning, WidthPruning), (WidthPruning, WandaPruning)])
def test_a_run_of_another_kind_does_not_replace_the_model_unless_asked(tmp_path, kinds):
    """The report of the first would lie beside the model of the second."""

    def prune(kind, **settings):
        settings |= {"keep": 0.5} if kind is WidthPruning else {}
        trainer(tmp_path, kind(**settings), cls=PruningTrainer).prune(SomebodysModule(), SomebodysData())
        return contents(tmp_path)

    before = prune(kinds[0])
    with pytest.raises(ValueError, match=r"results of another run, (pruning|shrinking)\.json: choose"):
        prune(kinds[1])
    assert contents(tmp_path) == before
    assert not {*prune(kinds[1], overwrite=True)} & {name for name in before if "/" not in name}


USERS_OWN = ("zero_shot/notes.json", "trials/mine/pruning.json", "search.txt")
"""Files of the user, beside those of a search with zero-shot tasks."""
LEFT = ("zero_shot/pruned.json", "zero_shot/step-3.json",
        "trials/0.25/pruning.json", "trials/0.25/zero_shot/dense.json",
        "trials/0.5/report.html", "search.json", "search.md", "search.png")  # fmt: skip


def leave_files(folder) -> None:
    for name in (*USERS_OWN, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def names(folder) -> set[str]:
    return {name for name in contents(folder) if name in (*USERS_OWN, *LEFT)}


def test_what_an_earlier_run_left_goes_with_its_report(tmp_path):
    run(tmp_path, sparsity=0.25)
    leave_files(tmp_path)
    run(tmp_path, sparsity=0.5, overwrite=True)
    assert names(tmp_path) == {*USERS_OWN}
    assert not (tmp_path / "trials/0.25").exists()


@pytest.mark.parametrize("save", [True, False])
def test_a_model_that_is_not_that_of_the_report_is_named(tmp_path, caplog, save):
    run(tmp_path, sparsity=0.25)
    run(tmp_path, sparsity=0.5, overwrite=True, save=save)
    assert (f"{tmp_path / 'model'} is left as it is: the model of the run before" in caplog.text) is not save


def test_a_run_that_is_done_again_keeps_what_lies_beside_it(tmp_path):
    for _ in range(2):
        run(tmp_path, sparsity=0.5, overwrite=True)
        leave_files(tmp_path)
    run(tmp_path, sparsity=0.5, overwrite=True)
    assert names(tmp_path) == {*USERS_OWN, *LEFT}


def test_a_run_that_fails_keeps_what_an_earlier_one_left(tmp_path, monkeypatch):
    run(tmp_path, sparsity=0.25)
    leave_files(tmp_path)
    monkeypatch.setattr(one_shot, "save_pretrained", Mock(side_effect=OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        run(tmp_path, sparsity=0.5, overwrite=True)
    assert names(tmp_path) == {*USERS_OWN, *LEFT}


def test_a_smaller_model_takes_the_place_of_a_search(tmp_path):
    run(tmp_path, sparsity=0.25)
    leave_files(tmp_path)
    smaller = trainer(tmp_path, WidthPruning(keep=0.5, overwrite=True), cls=PruningTrainer)
    smaller.prune(SomebodysModule(), SomebodysData())
    assert names(tmp_path) == {*USERS_OWN}


@pytest.mark.parametrize("kinds", [(WandaPruning, WidthPruning), (WidthPruning, WandaPruning)])
def test_of_a_run_of_another_kind_zero_shot_results_go_and_its_own_stay(tmp_path, tiny_model_folder, kinds):
    earlier, later = kinds[0](), kinds[1](overwrite=True)
    trainer(tmp_path, earlier, cls=PruningTrainer).prune(SomebodysModule(), SomebodysData())
    leave_files(tmp_path)
    tasks, module = ZeroShotEvaluation(["builtin_continuation"], limit=1), CausalLM(tiny_model_folder)
    one = trainer(tmp_path, later, tasks, cls=PruningTrainer, max_steps=1, val_check_interval=1)
    one.validate(module, data(), verbose=False)
    one.fit(module, data())
    one.save_pretrained(module)
    assert {file.stem for file in (tmp_path / "zero_shot").iterdir()} == {"dense", "step-1", "notes"}


def test_zero_shot_results_of_a_run_stay_where_it_replaces_another(tmp_path, tiny_model_folder):
    run(tmp_path, sparsity=0.25)
    leave_files(tmp_path)
    tasks = ZeroShotEvaluation(["builtin_continuation"], limit=2)
    two = trainer(tmp_path, WandaPruning(sparsity=0.5, overwrite=True), tasks, cls=PruningTrainer)
    two.validate(CausalLM(tiny_model_folder), data(), verbose=False)
    two.prune(two.lightning_module, data(), evaluate=False)
    two.validate(two.lightning_module, data(), verbose=False)
    assert {file.stem for file in (tmp_path / "zero_shot").iterdir()} == {"dense", "pruned", "notes"}
