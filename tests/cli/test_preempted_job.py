"""The batch script of the examples, in a cluster that preempts it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import digests
from test_crashes import LAYERS, SMALL, Run, dense, finished, server, start, uninterrupted  # noqa: F401 (fixtures)

SCRIPT = Path(__file__).parents[2] / "examples" / "preempted.sbatch"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "prune", "SLURM_NTASKS": "1"}
STEP = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


class Cluster:
    """Runs the batch script in a folder. Its ``srun`` hands the command over; ``scontrol`` notes what it is told."""

    def __init__(self, runner, model: Path, folder: Path) -> None:
        self.runner, self.model, self.folder = runner, model, folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        for pipe in ("command", "code"):
            os.mkfifo(folder / pipe)
        self._program("srun", 'printf "%s\\n" "$@" > command; exit "$(cat code)"')
        self._program("scontrol", 'echo "$@" >> told')

    def _program(self, name: str, line: str) -> None:
        (self.programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (self.programs / name).chmod(0o755)

    def job(self, signal_number: int | None = None, layers: int = 0) -> int:
        """Run the job, signal its step when so many layers are finished, and return the job's exit code."""
        path = f"{self.programs}:{os.environ['PATH']}"
        script = subprocess.Popen(
            ["bash", SCRIPT, str(self.model), "results"], cwd=self.folder, env={**os.environ, **SLURM, "PATH": path}
        )
        program, *arguments = (self.folder / "command").read_text().splitlines()
        assert program == "wanda-lightning"
        step = Run(self.runner, self.folder, [*arguments, *SMALL], 0.2 if signal_number else 0, None, SLURM | STEP)
        if signal_number:
            step.wait_for_layers(layers)
            step.signal(signal_number)
        code = step.end()
        (self.folder / "code").write_text(str(128 - code if code < 0 else code))
        return script.wait()

    @property
    def told(self) -> list[str]:
        """What ``scontrol`` was told."""
        file = self.folder / "told"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def cluster(server, dense, tmp_path) -> Cluster:  # noqa: F811
    return Cluster(server, dense, tmp_path)


def test_a_job_that_is_preempted_goes_on(cluster, uninterrupted, tmp_path):  # noqa: F811
    assert cluster.job(signal.SIGTERM, layers=2) == 143
    assert cluster.told == ["requeue 7"]
    kept = finished(tmp_path)
    assert 2 <= len(kept) < LAYERS

    assert cluster.job(signal.SIGKILL, layers=len(kept) + 2) == 137  # as on a node that fails
    assert kept < finished(tmp_path)
    assert len(finished(tmp_path)) < LAYERS

    assert cluster.job() == 0
    assert cluster.told == ["requeue 7"]
    assert digests(tmp_path / "results/model") == uninterrupted
    assert not (tmp_path / "results/unfinished").exists()
