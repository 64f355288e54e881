"""What a run runs on: versions, the machine, its memory."""

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch


def environment() -> dict[str, str]:
    """Return the date, the versions that a result depends on, and the name of the device: of the GPU if one is in use.

    A GPU that nothing has used is not asked for its name: that would begin to use it, after which no process can fork.
    """
    in_use = torch.cuda.is_initialized()
    device = torch.cuda.get_device_name() if in_use else platform.processor() or platform.machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "device": device,
        **installed_versions("wanda-lightning", "torch", "lightning", "transformers"),
    }


def installed_versions(*packages: str) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # the engine needs torch only, and may be used from a folder
            continue
    return versions


def peak_memory() -> dict[str, int]:
    """Measure the most memory that this process has held since it started, and its tensors on the fullest GPU."""
    peaks = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak process memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        peaks["peak device memory"] = max(torch.cuda.max_memory_allocated(device) for device in devices)
    return peaks
