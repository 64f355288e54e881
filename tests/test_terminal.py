"""One line a stage."""

import re
from io import StringIO

import pytest
from helpers import SomebodysData, SomebodysModule, trainer
from rich.console import Console
from rich.progress import Progress

from wanda_lightning import WandaPruning
from wanda_lightning.callbacks.plumbing.progress import StageBar
from wanda_lightning.evaluation.harness import Tqdm
from wanda_lightning.terminal import columns, track


def test_where_there_is_no_terminal_a_stage_is_a_plain_line(capsys):
    assert list(track(iter("abc"), 3, "Pruning", "layers", lambda: "2 GiB")) == ["a", "b", "c"]
    assert capsys.readouterr().out.split() == ["Pruning", "3/3", "layers", "in", "0:00:00", "2", "GiB"]


@pytest.mark.parametrize("width", [40, 80])
def test_on_a_narrow_terminal_figures_come_before_the_bar(width):
    bars = Progress(*columns(Console(width=width, force_terminal=True), "layers", lambda: "1.1 GiB"))
    bars.update(bars.add_task("Pruning", total=3), completed=3)
    console = Console(width=width, file=StringIO())
    console.print(bars.make_tasks_table(bars.tasks))
    assert re.fullmatch(r"Pruning +[━ ]*3/3 layers in 0:00:00 1.1 GiB *\n", console.file.getvalue())


def test_a_bar_as_lm_eval_uses_it(capsys):
    bar = Tqdm(total=3, desc="Running requests", disable=False)
    bar.update(2)
    bar.update(1)
    bar.close()
    assert capsys.readouterr().out.split() == ["Zero-shot", "3/3", "in", "0:00:00"]
    assert list(Tqdm(iter("ab"), disable=True)) == ["a", "b"]
    assert capsys.readouterr().out == ""
    assert list(Tqdm(["a"])) == ["a"]
    assert "1/1" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "shown"), [({}, "Training"), ({"max_steps": -1, "max_epochs": 2}, "epoch 2 of 2")])
def test_a_run_of_lightning(tmp_path, capsys, caplog, limit, shown):
    caplog.set_level("INFO")
    runner = trainer(tmp_path, StageBar(), WandaPruning(sparsity=0.5), enable_progress_bar=True, **limit)
    runner.validate(SomebodysModule(), SomebodysData(), verbose=False)
    runner.fit(SomebodysModule(), datamodule=SomebodysData())
    lines = [re.sub(r" +", " ", line).strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    stages = [line.split()[0].strip(",") for line in lines]
    assert stages == ["Evaluation", "Pruning", "Training"]
    assert lines[0].startswith("Evaluation 4/4 in 0:00:0")
    assert lines[1].startswith("Pruning 2/2 layers in 0:00:0")
    assert shown in lines[2]
    assert "Epoch" not in lines[2]
    said = [record.getMessage() for record in caplog.records][-2:]
    assert said[0].startswith("50.00% of the weights of 14 linears are zero (")
    assert said[1] == f"The report is in {tmp_path}: report.html, pruning.md, pruning.json"
