"""Every example runs, on a tiny model. As a script: write the notebook anew from the Python file beside it."""

import json
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from transformers.utils.logging import enable_progress_bar

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "from_model_to_report.ipynb"
SMALLER = {
    '"HuggingFaceTB/SmolLM2-135M"': '"MODEL"',
    ', "my_text.txt", 512': ', "my_text.txt", 16',
    "num_samples=64": "num_samples=4",
    "num_samples=32": "num_samples=4",
    "sequence_length=512": "sequence_length=16, max_evaluation_windows=2",
    "sequence_length=256": "sequence_length=16",
    "max_evaluation_windows=24": "max_evaluation_windows=2",
    "max_steps=16": "max_steps=2",
    "log_every_n_steps=10": "log_every_n_steps=1",
    "PruningTrainer(": "PruningTrainer(accelerator='cpu', enable_progress_bar=False, ",
}
IN_TRAINER = {"max_steps=100": "max_steps=2, use_cpu=True, disable_tqdm=True"}  # of Hugging Face
IN_LIGHTNING = {"max_steps=100": "max_steps=2"}


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_folder) -> Path:
    """An empty folder with a model and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(tiny_model_folder)
    (tmp_path / "my_text.txt").write_text(topics["assert"])
    return tmp_path


def run(name: str, smaller: dict[str, str]) -> dict[str, object]:
    """Run an example with what makes it small; return its names."""
    code = (EXAMPLES / name).read_text()
    for large, small in {**SMALLER, **smaller}.items():
        code = code.replace(large, small)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, name, "exec"), names)
    return names


def test_every_example_is_listed_and_tested():
    page = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text() + Path(__file__).with_name("cli").joinpath("test_preempted_job.py").read_text()
    for file in EXAMPLES.iterdir():
        if file.name not in ("README.md", "__pycache__"):
            assert f"({file.name})" in page
            assert file.name in tests


@pytest.fixture
def quiet(caplog) -> Iterator[None]:
    """What the notebook silences speaks again in other tests."""
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    yield
    enable_progress_bar()


@pytest.mark.usefixtures("quiet")
def test_the_notebook_runs(place, capsys):
    names = run("from_model_to_report.py", {})
    assert {*names["report"].evaluations} == {"dense", "pruned", "fine-tuned"}
    assert "50.0% of the pruned linears are zero, and the model loads whole: True" in capsys.readouterr().out


def test_the_notebook_is_made_of_the_python_file():
    assert NOTEBOOK.read_text() == notebook()


def test_digits_are_read_after_pruning(capsys):
    shorter = {"EPOCHS, FINE_TUNING_EPOCHS = 12, 3": "EPOCHS, FINE_TUNING_EPOCHS = 1, 1"}
    run("digits_vit.py", {"PruningTrainer(": "PruningTrainer(", **shorter})
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[0] for row in table] == ["| unstructured", "| 2:4"]
    assert all(row.endswith(" 50.0% |") for row in table)


def test_the_trainer_of_hugging_face(place, capsys):
    names = run("transformers_trainer.py", IN_TRAINER)
    assert names["trainer"].state.global_step == 2
    linear = names["model"].model.layers[0].mlp.up_proj
    assert (linear.weight == 0).float().mean() == 0.5
    assert (place / "results/trainer/model/model.safetensors").exists()
    assert names["report"].summary in capsys.readouterr().out


@pytest.fixture
def logged(place, monkeypatch) -> Path:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("loggers.py", IN_LIGHTNING)
    return place / "results/logs"


def test_tensorboard(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(logged.rglob("events.out.*")).parent)).Reload().Tags()
    shown = {
        "sparsity", "train/loss", "val/perplexity", "pruning/dense/val/perplexity", "pruning/pruned/val/perplexity",
        "pruning/layer/error/mlp.up_proj", "pruning/layer/sparsity/mlp.up_proj",
    }  # fmt: skip
    assert shown <= {*events["scalars"]}
    assert any("pruning/report" in name for name in events["tensors"])


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb brings 20 packages, and is not among the extras")
def test_weights_and_biases(logged):
    assert list(logged.glob("wandb/offline-run-*/*.wandb"))


def cells(code: str) -> Iterator[dict[str, object]]:
    """Take a Python file in the percent format apart, as Jupytext does."""
    _, *parts = f"\n{code}".split("\n# %%")
    for number, part in enumerate(parts):
        kind, _, text = part.partition("\n")
        lines = text.strip("\n").splitlines()
        if kind.strip() == "[markdown]":
            cell = {"cell_type": "markdown", "id": f"cell-{number}", "metadata": {}}
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        else:
            cell = {"cell_type": "code", "execution_count": None, "id": f"cell-{number}", "metadata": {}, "outputs": []}
        yield {**cell, "source": [f"{line}\n" for line in lines[:-1]] + lines[-1:]}


def notebook() -> str:
    """Write the Python file as a notebook, without outputs."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": [*cells(NOTEBOOK.with_suffix(".py").read_text())],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook())
