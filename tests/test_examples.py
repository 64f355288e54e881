"""Every example runs, on a tiny model. As a script: write the notebook anew from the Python file beside it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from helpers import digests, tiny_llama

from wanda_lightning.__main__ import main

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
    page, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for file in EXAMPLES.iterdir():
        if file.name not in ("README.md", "__pycache__"):
            assert f"({file.name})" in page
            assert file.name in tests


def test_the_notebook_runs(place, capsys):
    names = run("from_model_to_report.py", {})
    assert {*names["report"].evaluations} == {"dense", "pruned", "fine-tuned"}
    assert "50.0% of the pruned linears are zero, and the model loads whole: True" in capsys.readouterr().out


def test_the_notebook_is_made_of_the_python_file():
    assert NOTEBOOK.read_text() == notebook()


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


# What runs in place of the command, in a cluster of one node: layers take long enough for a signal to hit one.
SLOW = """
import sys, time
from wanda_lightning.engine import pruner
from wanda_lightning.__main__ import main

prune_layer = pruner.prune_layer
pruner.prune_layer = lambda *args, **kwargs: (time.sleep({seconds}), prune_layer(*args, **kwargs))[1]
sys.argv += {small}
main()
"""
SMALL = ["--num_samples=4", "--sequence_length=16", "--data.max_evaluation_windows=2", "--trainer.accelerator=cpu"]
LAYERS = 8


class Cluster:
    """Runs a batch script as a job; ``srun`` starts the step, ``scontrol`` notes that it is to come back."""

    def __init__(self, folder: Path, script: Path) -> None:
        self.folder, self.script = folder, script
        self.programs = folder / "bin"
        self.programs.mkdir()
        self._program("srun", 'echo $$ > step; exec env SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 "$@"')
        self._program("scontrol", 'echo "$@" >> scontrol.log')
        self._program("wanda-lightning", f'exec {sys.executable} {folder}/slow.py "$@"')

    def _program(self, name: str, line: str) -> None:
        (self.programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (self.programs / name).chmod(0o755)

    def job(self, *arguments: str, seconds: float = 0.3) -> "subprocess.Popen[str]":
        (self.folder / "slow.py").write_text(SLOW.format(seconds=seconds, small=SMALL))
        here = Path(__file__).parents[1]
        environment = {
            **os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}", "PYTHONPATH": str(here),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "prune", "SLURM_NTASKS": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return subprocess.Popen(["bash", self.script, *arguments], cwd=self.folder, env=environment, text=True)

    def signal(self, number: int, finished_layers: int) -> None:
        """Signal the step that runs when so many layers are finished."""
        deadline = time.monotonic() + 120
        while len(self.finished()) < finished_layers and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(int((self.folder / "step").read_text()), number)

    def finished(self) -> list[Path]:
        return sorted((self.folder / "out/unfinished").glob("layer-*"))


def test_a_job_that_is_preempted_goes_on(tmp_path, tokenizer, monkeypatch):
    model = tmp_path / "dense"
    tiny_llama(layers=LAYERS, vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    cluster = Cluster(tmp_path, EXAMPLES / "preempted.sbatch")
    requeued = tmp_path / "scontrol.log"

    job = cluster.job(str(model), "out")
    cluster.signal(signal.SIGTERM, finished_layers=2)
    assert job.wait() == 143
    assert requeued.read_text() == "requeue 7\n"
    kept = {file: file.read_bytes() for file in cluster.finished()}
    assert 2 <= len(kept) < LAYERS

    job = cluster.job(str(model), "out")
    cluster.signal(signal.SIGKILL, finished_layers=len(kept) + 2)
    assert job.wait() == 137  # as a node that goes down; SLURM brings the job back by itself
    assert {file: file.read_bytes() for file in kept} == kept
    assert len(cluster.finished()) < LAYERS

    assert cluster.job(str(model), "out", seconds=0).wait() == 0
    assert not cluster.finished()
    assert requeued.read_text() == "requeue 7\n"

    monkeypatch.chdir(tmp_path)  # and the same run, to which nothing happens
    asked = ["prune", str(model), "--method=sparsegpt", "--output=whole", *SMALL]
    monkeypatch.setattr(sys, "argv", ["wanda-lightning", *asked])
    main()
    assert digests(tmp_path / "out/model") == digests(tmp_path / "whole/model")


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
