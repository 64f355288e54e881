"""How fast a device computes, measured in a fraction of a second.

Processors without units for half precision multiply it hundreds of times slower than float32. There, what is measured
starts small, and grows only while there is time. Elsewhere it starts where the start of threads, which takes long on a
machine that is busy, weighs little.
"""

import time
from collections.abc import Callable

import torch

SECONDS = 0.3
"""How long one measurement may take."""
SMALLEST, USUAL, LARGEST = 64, 1024, 4096
TRIES = 3


def product_rate(dtype: torch.dtype, device: torch.device | str) -> float:
    """Measure matrix products: floating point operations a second."""

    def product(size: int) -> Callable[[], torch.Tensor]:
        a, b = torch.ones(2, size, size, dtype=dtype, device=device)
        return lambda: a @ b

    may_be_slow = dtype.itemsize < 4 and torch.device(device).type == "cpu"
    return _rate(product, lambda size: 2 * size**3, SMALLEST if may_be_slow else USUAL)


def sorting_rate(device: torch.device | str) -> float:
    """Measure sorting, which choosing a mask consists of: numbers a second."""

    def sorting(size: int) -> Callable[[], torch.Tensor]:
        scores = torch.rand(size, size, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
        return lambda: scores.sort(dim=1, stable=True).indices

    return _rate(sorting, lambda size: size**2, USUAL)


def _rate(prepared: Callable[[int], Callable[[], torch.Tensor]], operations: Callable[[int], int], size: int) -> float:
    """Measure sizes, each twice the one before, as long as there is time.

    Args:
        prepared: Makes what is timed from a size.
        operations: How many operations a size has.
        size: The first.

    Returns:
        Operations a second.
    """
    _seconds(prepared(size))  # the first call on a device also loads libraries
    left, rate = SECONDS, 0.0
    while True:
        seconds = [_seconds(run) for run in [prepared(size)] * TRIES]
        rate = operations(size) / min(seconds)
        left -= sum(seconds)
        size *= 2
        if size > LARGEST or TRIES * operations(size) / rate > left:
            return rate


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    run()[0, 0].item()  # the item waits for a GPU
    return time.perf_counter() - started
