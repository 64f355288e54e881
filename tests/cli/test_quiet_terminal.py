"""No line on the terminal that is not about the run."""

import logging
import re
import shutil
import subprocess
import sys
from io import BytesIO, TextIOWrapper

import pytest
import torch

from wanda_lightning.__main__ import main


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="a GPU is worth a line")
def test_the_terminal_of_a_run(tiny_model_folder, tmp_path):
    """The names of its folders are no markup."""
    shutil.copytree(tiny_model_folder, tmp_path / "tiny[a]")
    options = ["--num_samples=4", "--sequence_length=16", "--data.max_evaluation_windows=2", "--output=out[b]"]
    command = [sys.executable, "-m", "wanda_lightning", "prune", "tiny[a]", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    bars = [line for line in lines if re.match(r"(Evaluation +2/2|Pruning +3/3 layers) in 0:00:0\d", line)]
    assert len(bars) == 3
    shown = [line for line in lines if line not in bars]
    assert shown == lines[-len(shown) :]
    assert shown[0] == "Wanda, unstructured, sparsity 0.5"
    assert shown[1] == "Model: tiny[a], 44,320 parameters."
    assert any(re.match(r"│ val/perplexity +│ [\d.]+ │ +[\d.]+ │$", line) for line in shown)
    said = [line.split()[0] for line in shown[-10:-1]]
    assert said == ["The", "dense", "pruned", "Once", "dense", "pruned", "Water", "dense", "pruned"]
    assert shown[-1] == "Results are in out[b]: report.html, model"
    assert len(shown) <= 21
    assert "\x1b" not in done.stdout


def test_retries_of_the_hub_are_one_line(monkeypatch, caplog):
    """What came of them is in the error."""
    hub = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(hub, "filters", [])
    monkeypatch.setattr(sys, "argv", ["wanda-lightning", "generate", "no/such"])
    with pytest.raises(SystemExit):
        main()
    caplog.clear()
    for number in range(2):
        hub.warning("'no answer' thrown while requesting HEAD no/such")
        hub.warning("Retrying in %ss [Retry %s/5].", 1, number + 1)
    assert [record.getMessage() for record in caplog.records] == [
        "the hub does not answer; it is tried for half a minute"
    ]


def test_a_pipe_that_knows_few_characters(tiny_model_folder, monkeypatch):
    """As on Windows; what the model says holds others, too."""
    monkeypatch.setattr(
        sys, "argv", ["wanda-lightning", "generate", str(tiny_model_folder), "Omega is Ω", "--tokens=2"]
    )
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="cp1252"))
    main()
    sys.stdout.seek(0)
    assert sys.stdout.read().startswith("Omega is ?")


def unread(folder, *arguments: str) -> tuple[int, str]:
    """The exit code of a command whose output nobody reads, as behind ``| head``, and what it said of that."""
    command = [sys.executable, "-m", "wanda_lightning", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    return process.wait(), said


def test_a_list_that_is_not_read_to_its_end(tmp_path):
    assert unread(tmp_path, "recipes") == (0, "")


def test_a_run_whose_output_nobody_reads_saves_its_model(tiny_model_folder, tmp_path):
    options = ["--num_samples=4", "--sequence_length=16", "--data.max_evaluation_windows=2", "--output=out"]
    unread(tmp_path, "prune", str(tiny_model_folder), *options)
    assert (tmp_path / "out/model/model.safetensors").exists()
