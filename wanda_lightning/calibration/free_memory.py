"""How much memory there still is, as far as the system tells."""

import sys
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be had on a device; None where nobody tells.

    Args:
        device: The CPU or a GPU. Of a GPU, what torch holds and does not use counts as free.

    Returns:
        Bytes; on a CPU no more than the process may take (``ulimit -v``).
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not MEMINFO.is_file():
        return None
    lines = MEMINFO.read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min(available, _left_of_limit(sys.maxsize))


def _left_of_limit(unlimited: int) -> int:
    """Return how many more bytes of address space the process may take."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return unlimited
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return max(0, limit - taken)
