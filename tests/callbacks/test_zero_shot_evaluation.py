import gc
import json
from functools import partial

import helpers
import pytest
import torch
from helpers import TWO_PROCESSES, few_windows, loader
from lightning.pytorch import Callback

from wanda_lightning.callbacks import WandaPruning, WidthPruning, ZeroShotEvaluation
from wanda_lightning.data import TextDataModule
from wanda_lightning.evaluation import evaluate_zero_shot
from wanda_lightning.runs.causal_lm import CausalLM
from wanda_lightning.runs.trainer import PruningTrainer

TASK = "builtin_continuation"
ACC = f"val/zero_shot/{TASK}/acc"


def trainer(tmp_path, *callbacks, **settings):
    return helpers.trainer(tmp_path, *callbacks, **{"max_steps": 4} | settings)


def zero_shot(**settings) -> ZeroShotEvaluation:
    return ZeroShotEvaluation([TASK], **{"limit": 12, **settings})


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def module(folder) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(str(folder), optimizer=partial(torch.optim.AdamW, lr=0.01))


def test_results_are_metrics_of_validation(tiny_model_folder, tmp_path):
    language_model = module(tiny_model_folder)
    (metrics,) = trainer(tmp_path, zero_shot()).validate(language_model, loader(), verbose=False)
    expected = evaluate_zero_shot(language_model.model, language_model.tokenizer, [TASK], limit=12).metrics
    logged = {name.removeprefix("val/zero_shot/"): v for name, v in metrics.items() if "zero_shot" in name}
    assert logged == pytest.approx(expected)
    assert logged.keys() == {
        *(f"{TASK}/{metric}" for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")),
        "mean/acc",
        "mean/acc_stderr",
    }
    details = json.loads((tmp_path / "zero_shot/validate.json").read_text())
    assert details["results"][TASK]["acc,none"] == expected[f"{TASK}/acc"]
    (metrics,) = trainer(tmp_path, zero_shot()).test(language_model, loader(), verbose=False)
    assert metrics[f"test/zero_shot/{TASK}/acc"] == pytest.approx(expected[f"{TASK}/acc"])


def test_training_is_that_of_a_run_without(tiny_model_folder, tmp_path):
    """Same losses, bit by bit, with dropout drawing from the random state."""

    def losses(*callbacks):
        language_model = module(tiny_model_folder)
        language_model.model_kwargs["attention_dropout"] = 0.3
        watch = Losses()
        run = trainer(tmp_path, watch, *callbacks, max_steps=8, val_check_interval=2)
        run.fit(language_model, loader(), loader())
        return watch.losses, language_model.model.training

    without, _ = losses()
    evaluation = zero_shot(num_fewshot=1)
    assert losses(evaluation) == (without, True)
    assert evaluation.result is not None
    assert len(set(without)) == 8


@pytest.mark.parametrize(("every", "expected"), [(1, [4, 8, 12]), (2, [8]), (0, [])])
def test_every_n_epochs_and_not_in_the_sanity_check(tiny_model_folder, tmp_path, every, expected):
    settings = {"max_steps": -1, "max_epochs": 3, "num_sanity_val_steps": 1}
    run = trainer(tmp_path, zero_shot(limit=2, every_n_epochs=every), **settings)
    run.fit(module(tiny_model_folder), loader(), loader())
    written = [path.stem for path in (tmp_path / "zero_shot").glob("*.json")]
    assert sorted(written) == sorted(f"step-{step}" for step in expected)


def test_the_report_compares_dense_with_pruned(tiny_model_folder, tmp_path):
    run = trainer(tmp_path, WandaPruning(sparsity=0.5), zero_shot(), cls=PruningTrainer)
    data = TextDataModule(num_samples=2, sequence_length=16, max_evaluation_windows=4)
    report = run.prune(module(tiny_model_folder), data, save=False)
    assert [ACC in stage for stage in report.evaluations.values()] == [True, True]
    assert {path.name for path in (tmp_path / "zero_shot").iterdir()} == {"dense.json", "pruned.json"}
    table = report.to_markdown()
    row = next(line for line in table.splitlines() if f"| {ACC} |" in line)
    acc, error = (report.evaluations["dense"][name] for name in (ACC, f"{ACC}_stderr"))
    assert f"| {acc:.4g} ± {error:.2g} |" in row
    assert "_stderr |" not in table


def test_answers_of_the_dense_model_stay_beside_those_of_the_smaller_one(tiny_model_folder, tmp_path):
    run = trainer(tmp_path, WidthPruning(keep=0.5), zero_shot(limit=2), cls=PruningTrainer)
    run.prune(module(tiny_model_folder), few_windows(), save=False)
    assert {path.name for path in (tmp_path / "zero_shot").iterdir()} == {"dense.json", "smaller.json"}


def test_a_task_that_cannot_be_had_ends_the_run_at_its_start(tiny_model_folder, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    hub_task = "task: from_the_hub\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n"
    (folder / "hub.yaml").write_text(hub_task + 'doc_to_text: "{{q}}"\ndoc_to_choice: c\ndoc_to_target: l\n')
    pruning = WandaPruning(sparsity=0.5)
    evaluation = ZeroShotEvaluation(["from_the_hub"], include_path=str(folder))
    language_model = module(tiny_model_folder)
    run = trainer(tmp_path / "run", pruning, evaluation, cls=PruningTrainer)
    with pytest.raises(ConnectionError, match=r"(?s)'from_the_hub' cannot be loaded.*builtin_continuation"):
        run.prune(language_model, TextDataModule(num_samples=2, sequence_length=16))
    assert language_model.model is None  # not even loaded
    assert pruning.report is None
    assert not (tmp_path / "run").exists()


def test_a_module_without_a_tokenizer_is_refused(tmp_path, tiny_model_folder):
    language_model = module(tiny_model_folder)
    del language_model.tokenizer
    with pytest.raises(ValueError, match="needs a tokenizer: CausalLM has no attribute tokenizer"):
        trainer(tmp_path, zero_shot()).validate(language_model, loader())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precision_of_the_trainer(tiny_model_folder, tmp_path, precision):
    (metrics,) = trainer(tmp_path, zero_shot(), precision=precision).validate(module(tiny_model_folder), loader())
    assert 0 <= metrics[ACC] <= 1


def test_repeated_validation_keeps_no_memory(tiny_model_folder, tmp_path):
    language_model, run = module(tiny_model_folder), trainer(tmp_path, zero_shot())

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    run.validate(language_model, loader(), verbose=False)
    before = tensors()
    for _ in range(3):
        run.validate(language_model, loader(), verbose=False)
    assert tensors() <= before


def test_two_processes_give_the_numbers_of_one(tiny_model_folder, tmp_path):
    """An odd number of questions, and one that leaves a process without any."""
    for limit in (11, 1):
        run = trainer(tmp_path / "two", zero_shot(limit=limit), **TWO_PROCESSES)
        (two,) = run.validate(module(tiny_model_folder), loader(), verbose=False)
        (one,) = trainer(tmp_path / "one", zero_shot(limit=limit)).validate(module(tiny_model_folder), loader())
        assert {k: v for k, v in two.items() if "zero_shot" in k} == pytest.approx(
            {k: v for k, v in one.items() if "zero_shot" in k}
        )


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_fast_dev_run_asks_one_question_and_writes_no_file(tiny_model_folder, tmp_path, stage):
    callback = zero_shot(limit=None)
    getattr(trainer(tmp_path, callback, fast_dev_run=True), stage)(module(tiny_model_folder), few_windows())
    assert callback.result.details["n-samples"][TASK]["effective"] == 1
    assert not list(tmp_path.rglob("*.json"))


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="every_n_epochs must be a whole number of at least 0, got -1"):
        ZeroShotEvaluation(every_n_epochs=-1)
    with pytest.raises(ValueError, match=r"limit must be .* got 1.5"):
        ZeroShotEvaluation(limit=1.5)
