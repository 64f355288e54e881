"""Full float32 matrix products, whatever the user allows elsewhere, and long sums in the longest floats there are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def longest_float(device: torch.device) -> torch.dtype:
    """Return float64; float32 on Apple's GPUs, which have nothing longer."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Keep float32 matrix products in float32: no autocast, no TF32 on GPUs, no bfloat16 on CPUs.

    Trainers run forwards under autocast and set ``torch.set_float32_matmul_precision("medium")`` for speed. Sums over
    a hundred thousand tokens and a Cholesky factor of them need every bit.

    Args:
        device: Where the products are computed.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
