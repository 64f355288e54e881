"""How much memory there still is, as far as the system tells."""

from collections.abc import Iterator
from pathlib import Path

import torch

OLD_GROUP = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
GROUP = ("memory.max", "memory.current", "inactive_file")
"""Where Linux says of a control group its limit, what it takes, and how much of that is files which it can forget."""


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be had on a device; None where nobody tells.

    Args:
        device: The CPU or a GPU. Of a GPU, what torch holds and does not use counts as free.
        root: Where the system's files are.

    Returns:
        Bytes; on a CPU no more than the process may take: by ``ulimit -v``, in its container or its SLURM job.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = root / "proc/meminfo"
    if device.type != "cpu" or not meminfo.is_file():
        return None
    lines = meminfo.read_text().splitlines()
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]  # not in WSL 1
    return min([*available, *_left_of_limit(), *_left_of_groups(root)], default=None)


def _left_of_limit() -> Iterator[int]:
    """Yield how many more bytes of address space the process may take, if that is limited."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        yield max(0, limit - taken)


def _left_of_groups(root: Path) -> Iterator[int]:
    """Yield how many more bytes each control group that the process is in may take, if it is limited.

    Within a container its own group is the top one, whatever its name is: a folder that is not there sets no limit.
    """
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        group = root / "sys/fs/cgroup" / ("memory" if controllers else "") / path.lstrip("/")
        for folder in (group, *group.parents):
            yield from _left_of_group(folder, *(OLD_GROUP if controllers else GROUP))


def _left_of_group(folder: Path, limit: str, usage: str, forgettable: str) -> Iterator[int]:
    try:
        most, taken = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return
    if most != "max":
        yield max(0, int(most) - taken + int(kinds.get(forgettable, 0)))
