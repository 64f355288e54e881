"""Real runs of the command line, killed, interrupted, out of disk, two at once."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked_runs
import pytest
from helpers import digests, tiny_llama

from wanda_lightning.__main__ import main
from wanda_lightning.runs.causal_lm import CausalLM

LAYERS = 12
SMALL = [
    "--data.num_samples=4",
    "--data.sequence_length=16",
    "--data.max_evaluation_windows=2",
    "--trainer.default_root_dir=results",
    "--trainer.accelerator=cpu",
]


class Server:
    """A process that runs the command line."""

    def __init__(self) -> None:
        paths = f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"
        self.process = subprocess.Popen(
            [sys.executable, forked_runs.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"},
        )

    def ask(self, **request) -> int:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


class Run:
    """A run of the command line that has been started."""

    def __init__(
        self, server: Server, folder: Path, arguments: list[str], seconds: float, step: str | None,
        variables: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.server, self.folder = server, folder
        self._before, self._solved_before = len(self._output()), len(self._solved())
        self.pid = server.ask(arguments=arguments, folder=str(folder), seconds=seconds, step=step, variables=variables)
        self._code: int | None = None

    def end(self) -> int:
        """Wait for its end; return the exit code, of a killed process the negative signal."""
        if self._code is None:
            self._code = self.server.ask(wait=self.pid)
        return self._code

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.signal(number)
        return self.end()

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self._code is None:  # else the number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait_for(self, happened) -> None:
        """Wait until something is so, or the run has ended."""
        while not happened() and not _is_zombie(self.pid):
            time.sleep(0.002)

    def wait_for_layers(self, number: int) -> None:
        self.wait_for(lambda: len(finished(self.folder)) >= number)
        assert finished(self.folder), self.said

    @property
    def said(self) -> str:
        return self._output()[self._before :]

    @property
    def solved(self) -> list[str]:
        """The files that the layers it solves will have."""
        return self._solved()[self._solved_before :]

    def _output(self) -> str:
        file = self.folder / "output"
        return file.read_text() if file.exists() else ""

    def _solved(self) -> list[str]:
        file = self.folder / "solved"
        names = file.read_text().split() if file.exists() else []
        return [f"layer-{int(name.rpartition('.')[2]):05d}.safetensors" for name in names]


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended; the server waits for it only when it is asked for the exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def finished(folder: Path) -> set[str]:
    return {file.name for file in (folder / "results/unfinished").glob("layer-*")}


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()
    server.process.stdout.close()


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(layers=LAYERS, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def start(server, dense):
    """Start a run; it ends with the test."""
    before = digests(dense)
    started: list[Run] = []

    def start(folder, *more, command="prune", recipe="sparsegpt", seconds=0.03, step=None) -> Run:
        folder.mkdir(exist_ok=True)
        arguments = [command, "-c", recipe, f"--model.pretrained={dense}", *SMALL, *more]
        started.append(Run(server, folder, arguments, seconds, step))
        return started[-1]

    yield start
    for run in started:
        run.kill()
    assert digests(dense) == before


@pytest.fixture
def uninterrupted(start, tmp_path_factory):
    """The bytes of the model that a run gives to which nothing happens."""
    folder = tmp_path_factory.getbasetemp() / "uninterrupted"
    if not folder.exists():
        run = start(folder, seconds=0)
        assert run.end() == 0, run.said
        assert len(run.solved) == LAYERS
    return digests(folder / "results/model")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_lose_nothing(kills, start, uninterrupted, tmp_path):
    chance = random.Random(kills)
    folders = (tmp_path / f"run {number}" for number in itertools.count())
    while kills:
        folder = next(folders)
        kept: set[str] = set()
        code = None
        while code != 0:
            run = start(folder)
            if kills and chance.random() < 0.7:  # while it prunes
                goal = len(kept) + chance.randrange(3)
                run.wait_for(lambda run=run, goal=goal: len(finished(run.folder)) >= goal)
                time.sleep(chance.uniform(0, 0.04))
            elif kills:  # at any time: while it loads, evaluates, prunes or saves
                time.sleep(chance.uniform(0, 3))
            code = run.kill() if kills else run.end()
            assert code in (0, -signal.SIGKILL), run.said
            kills -= code != 0
            assert kept.isdisjoint(run.solved)
            kept = finished(folder)
        assert digests(folder / "results/model") == uninterrupted
        assert not (folder / "results/unfinished").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end(number, start, uninterrupted, tmp_path):
    run = start(tmp_path, seconds=0.2)
    run.wait_for_layers(2)
    code = run.kill(number)
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 1}[number]
    assert "Traceback" not in run.said
    kept = finished(tmp_path)
    assert 2 <= len(kept) < LAYERS
    if number == signal.SIGTERM:  # it ended between two layers
        assert set(run.solved) == kept
    assert not (tmp_path / "results/model").exists()
    again = start(tmp_path, seconds=0)
    assert again.end() == 0, again.said
    assert f"layers finished before: {len(kept)}, in {tmp_path / 'results/unfinished'}" in again.said
    assert len(again.solved) == LAYERS - len(kept)
    assert digests(tmp_path / "results/model") == uninterrupted


@pytest.mark.parametrize("batch", [0, 1])
def test_a_run_that_is_asked_to_end_while_it_evaluates(batch, dense, tmp_path, monkeypatch):
    def asked(module, data, index, original=CausalLM.validation_step):
        if index == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        original(module, data, index)

    monkeypatch.setattr(CausalLM, "validation_step", asked)
    monkeypatch.chdir(tmp_path)
    arguments = ["prune", "-c", "sparsegpt", f"--model.pretrained={dense}", *SMALL, "--data.batch_size=1"]
    monkeypatch.setattr(sys, "argv", ["wanda-lightning", *arguments])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 143
    assert not finished(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_two_runs_at_once(start, uninterrupted, tmp_path):
    first = start(tmp_path)
    first.wait_for_layers(1)
    first.signal(signal.SIGSTOP)  # it would be over too soon
    config = (tmp_path / "results/config.yaml").read_text()
    for more in ([], ["--trainer.callbacks.resume=false", "--trainer.callbacks.sparsity=0.6"]):
        second = start(tmp_path, *more)
        assert second.end() == 2
        said = second.said.partition("wanda-lightning: error: ")[2]
        assert said.startswith(f"another run is writing to {tmp_path / 'results'}: wait for it, or choose another")
        assert "Traceback" not in second.said
    assert (tmp_path / "results/config.yaml").read_text() == config
    first.signal(signal.SIGCONT)
    assert first.end() == 0, first.said
    assert digests(tmp_path / "results/model") == uninterrupted


def test_a_crash_while_the_model_is_saved(start, uninterrupted, tmp_path):
    run = start(tmp_path, seconds=0, step="save_pretrained")
    assert run.end() == 1
    assert len(finished(tmp_path)) == LAYERS
    again = start(tmp_path)
    assert again.end() == 0, again.said
    assert not again.solved
    assert digests(tmp_path / "results/model") == uninterrupted
    assert not (tmp_path / "results/unfinished").exists()


def test_another_recipe_in_the_folder_of_an_unfinished_run(start, uninterrupted, tmp_path):
    run = start(tmp_path, seconds=0.1)
    run.wait_for_layers(2)
    run.kill()
    kept = finished(tmp_path)
    other = start(tmp_path, "--trainer.callbacks.sparsity=0.6", "--data.num_samples=8", seconds=0)
    assert other.end() == 2
    assert "holds the finished layers of another run" in other.said
    assert "sparsity: 0.5 there, 0.6 now" in other.said
    assert "resume=False" in other.said
    assert "Traceback" not in other.said
    assert finished(tmp_path) == kept
    anew = start(tmp_path, "--trainer.callbacks.sparsity=0.6", "--trainer.callbacks.resume=false", seconds=0)
    assert anew.end() == 0, anew.said
    assert len(anew.solved) == LAYERS
    assert not (tmp_path / "results/unfinished").exists()


def test_a_fine_tuning_that_is_killed(start, tmp_path):
    options = ["--trainer.max_steps=1000000", "--data.batch_size=1"]
    run = start(tmp_path, *options, command="fit", recipe="wanda_finetune", seconds=0)
    report = tmp_path / "results/pruning.json"
    run.wait_for(lambda: report.exists() and "pruned" in json.loads(report.read_text())["evaluations"])
    time.sleep(0.1)
    assert run.kill() == -signal.SIGKILL, run.said
    assert len(finished(tmp_path)) == LAYERS
    again = start(tmp_path, options[1], "--trainer.max_steps=2", command="fit", recipe="wanda_finetune", seconds=0)
    assert again.end() == 0, again.said
    assert not again.solved
    found = json.loads(report.read_text())
    assert list(found["evaluations"]) == ["dense", "pruned", "fine-tuned"]
    assert found["sparsity"] == 0.5
    assert not (tmp_path / "results/unfinished").exists()


def test_a_fine_tuning_that_is_asked_to_end(start, tmp_path):
    """SIGTERM ends it at the next step, not at the millionth, and what is on disk is whole."""
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.log_every_n_steps=1"]
    options = [*logger, "--trainer.logger.flush_logs_every_n_steps=1", "--data.batch_size=1"]
    run = start(tmp_path, *options, "--trainer.max_steps=1000000", command="fit", recipe="wanda_finetune", seconds=0)
    run.wait_for(lambda: any("train/loss" in file.read_text() for file in tmp_path.rglob("metrics.csv")))
    assert run.kill(signal.SIGTERM) == 143, run.said
    assert "Traceback" not in run.said
    (report,) = tmp_path.rglob("pruning.json")
    found = json.loads(report.read_text())
    assert list(found["evaluations"]) == ["dense", "pruned"]
    assert found["sparsity"] == 0.5


def test_a_sweep_leaves_no_layers(start, tmp_path):
    options = ["--methods=[Wanda]", "--sparsities=[0.5]", "--patterns=[]"]
    run = start(tmp_path, *options, command="sweep", recipe="sweep", seconds=0)
    assert run.end() == 0, run.said
    assert (tmp_path / "results/wanda-0.5/pruning.json").exists()
    assert not [*tmp_path.rglob("unfinished")]


def trials_of(folder: Path) -> int:
    file = folder / "results/search.json"
    return len(json.loads(file.read_text())["trials"]) if file.exists() else 0


def test_a_search_that_is_killed_goes_on_to_the_same_end(start, tmp_path):
    """Killed within its second trial, and again when it prunes to what it has found."""
    options = ["--max_perplexity_increase=0.5", "--step=0.125", "--held_out_windows=2"]
    whole = start(tmp_path / "whole", *options, command="search", recipe="search", seconds=0)
    assert whole.end() == 0, whole.said
    for number in (1, trials_of(tmp_path / "whole")):
        run = start(tmp_path / "parts", *options, command="search", recipe="search")
        run.wait_for(lambda: trials_of(run.folder) >= number)  # noqa: B023 (called before it changes)
        at = len(run.solved)
        run.wait_for(lambda: len(run.solved) > at + 2)  # noqa: B023
        assert run.kill() == -signal.SIGKILL, run.said
        assert trials_of(run.folder) == number
    rest = start(tmp_path / "parts", *options, command="search", recipe="search", seconds=0)
    assert rest.end() == 0, rest.said
    assert len(rest.solved) <= LAYERS  # the trials were kept
    found = [tmp_path / name / "results" for name in ("whole", "parts")]
    for name in ("search.json", "search.md"):
        assert (found[0] / name).read_text() == (found[1] / name).read_text()
    assert digests(found[0] / "model") == digests(found[1] / "model") != {}


def test_a_search_that_cannot_end_well_ends_in_one_line(start, tmp_path):
    for budget, message in (  # the perplexity of random weights falls
        (["--metric=perplexity", "--max_drop=0"], "budget cannot be met, even the smallest sparsity is too much: 50 %"),
        (["--max_bytes=10"], "budget cannot be met: at the largest sparsity, 50 %, the weights take "),
    ):
        options = [*budget, "--step=0.5", "--held_out_windows=2", "--overwrite"]
        run = start(tmp_path, *options, command="search", recipe="search", seconds=0)
        assert run.end() == 2, run.said
        assert run.said.count("error: ") == 1
        assert f"error: the {message}" in run.said
        assert "Traceback" not in run.said
        assert not (tmp_path / "results/model").exists()


@pytest.fixture
def small_disk(tmp_path, dense):
    """A folder with room for the results, but not for all layers."""
    folder = tmp_path / "results"
    folder.mkdir()
    size = sum(file.stat().st_size for file in dense.glob("*.safetensors")) // 2
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"no file system of its own can be mounted here: {error}")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    yield resize
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk, start, uninterrupted, tmp_path):
    run = start(tmp_path, seconds=0)
    assert run.end() == 1, run.said
    kept = len(finished(tmp_path))
    assert 0 < kept < LAYERS
    assert "No space left on device" in run.said
    assert f"The {kept} layers before it are kept" in run.said
    assert "Traceback" not in run.said
    small_disk("20m")
    again = start(tmp_path, seconds=0)
    assert again.end() == 0, again.said
    assert len(again.solved) == LAYERS - kept
    assert digests(tmp_path / "results/model") == uninterrupted
