"""How much memory is left, in folders like those of Linux."""

import re
import resource
import sys
from pathlib import Path

import pytest
import torch

from wanda_lightning.calibration.free_memory import free_memory

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def system(tmp_path):
    """A function that writes the files of a machine with 1000 MiB to spare, and those given; sizes are in MiB."""

    def write(**groups):
        files = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {1000 * 1024} kB\n"}
        for name, text in {**files, **groups}.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


def group(folder, most, taken, files=0):
    """A control group of version 2."""
    folder, most = f"sys/fs/cgroup{folder}", most if most == "max" else most * MIB
    return {
        f"{folder}/memory.max": f"{most}\n",
        f"{folder}/memory.current": f"{taken * MIB}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {files * MIB}\n",
    }


def old_group(folder, most, taken, files=0):
    """A control group of version 1, which says for itself alone, too, what it takes with those below it."""
    folder = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{most * MIB}\n",
        f"{folder}/memory.usage_in_bytes": f"{taken * MIB}\n",
        f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {files * MIB}\n",
    }


IN = {"proc/self/cgroup": "0::/slurm/job/step\n"}
OLD = {"proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/docker/abc\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 1000),
        (IN, 1000),
        (IN | group("/slurm/job/step", "max", 300), 1000),
        (IN | group("/slurm/job/step", 500, 300), 200),
        (IN | group("/slurm/job/step", 500, 300, files=100), 300),
        (IN | group("/slurm/job/step", "max", 50) | group("/slurm/job", 400, 350) | group("/slurm", 900, 400), 50),
        (IN | group("/slurm/job/step", 100, 120), 0),
        (IN | group("/slurm/job/step", 9000, 300), 1000),
        (IN | group("/slurm/other", 500, 300), 1000),
        ({"proc/self/cgroup": "0::/\n"} | group("", 500, 300), 200),  # in a container
        (OLD | old_group("", 500, 300, files=100), 300),  # in a container
        (OLD | old_group("/docker/abc", 500, 300) | old_group("", 2**43, 900), 200),
        (OLD | old_group("/docker/abc", 500, 300) | old_group("/other", 100, 90), 200),
    ],
)
def test_control_groups_limit_what_is_left(system, files, left):
    assert free_memory(CPU, system(**files)) == left * MIB


def test_a_system_that_does_not_say_what_is_available(system):
    """The first Windows Subsystem for Linux is one."""
    quiet = {"proc/meminfo": "MemTotal: 9 kB\nMemFree: 5 kB\n"}
    assert free_memory(CPU, system(**quiet)) is None
    assert free_memory(CPU, system(**quiet, **IN, **group("/slurm/job/step", 500, 300))) == 200 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of the process")
def test_a_limit_of_the_shell(system, monkeypatch):
    (taken,) = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = int(taken) * 1024 + 500 * MIB
    monkeypatch.setattr("resource.getrlimit", lambda of: (limit, -1) if of == resource.RLIMIT_AS else None)
    assert abs(free_memory(CPU, system()) - 500 * MIB) < 50 * MIB
    monkeypatch.setattr("resource.getrlimit", lambda of: (100 * MIB, -1))
    assert free_memory(CPU, system()) == 0


def test_on_this_machine():
    free = free_memory(CPU)
    assert free is None or 2**20 < free < 2**50


def test_nobody_tells_of_other_devices():
    assert free_memory(torch.device("meta")) is None
