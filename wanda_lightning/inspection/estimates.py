"""What pruning would take, estimated without doing it."""

import time
from typing import Any

import torch

from wanda_lightning.inspection.kinds import LinearKind
from wanda_lightning.model.decoder import DecoderLayer


def _one_a_group(kinds: list[LinearKind]) -> list[LinearKind]:
    """Keep one of the kinds that share an input: they have one Hessian."""
    return list({kind.name if kind.input_group is None else kind.input_group: kind for kind in kinds}.values())


def _memory(
    model: Any, layers: list[DecoderLayer], kinds: list[LinearKind], activations: int, tokens: int
) -> dict[str, int]:
    """Count bytes; what is "in all" needs the device while it prunes, the calibration activations besides."""
    size = model.dtype.itemsize
    weights = size * sum(parameter.numel() for parameter in model.parameters())
    by_layer = [size * sum(p.numel() for p in layer.module.parameters()) for layer in layers]
    hessians = 4 * sum(kind.count * kind.shape[1] ** 2 for kind in _one_a_group(kinds)) // len(layers)
    widest = max(kind.shape[1] for kind in kinds)
    largest = max(kind.shape[0] * kind.shape[1] for kind in kinds)
    factor = 4 * 2 * widest**2  # with scratch
    batch = size * 4 * tokens * widest
    # A layer's pruned weights are put in place together, so there are two of it. Scores in float32 are sorted, with
    # places in int64; solving holds two copies of a matrix in float32. Streaming has Hessians of a layer's size at a
    # time, or the largest: see CalibratedLayer.passes.
    wanda, solve = max(by_layer) + 20 * largest + batch, max(by_layer) + factor + 8 * largest + batch
    streamed = weights - sum(by_layer) + max(by_layer)
    return {
        "weights of the model": weights,
        "weights of its largest layer": max(by_layer),
        "calibration activations": size * activations,
        "second-order methods, besides": hessians + factor,
        "Wanda in all, in memory": weights + wanda,
        "Wanda in all, streamed": streamed + wanda,
        "SparseGPT in all, in memory": weights + solve + hessians,
        "SparseGPT in all, streamed": streamed + solve + min(hessians, max(*by_layer, 4 * widest**2)),
    }


def _seconds(kinds: list[LinearKind], tokens: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Divide the operations of the matrix products by the rate of one that is timed; attention is not counted."""
    ordinary, exact = _rate(dtype, device), _rate(torch.float32, device)
    forward = sum(2 * tokens * kind.tokens * kind.count * kind.shape[0] * kind.shape[1] for kind in kinds) / ordinary
    sums = sum(tokens * kind.tokens * kind.count * kind.shape[1] ** 2 for kind in _one_a_group(kinds))
    solving = sum(2 * kind.count * kind.shape[0] * kind.shape[1] ** 2 for kind in kinds) / exact
    hessians = 1.13 * sums / (exact if device == "cpu" else ordinary)  # of the symmetric product, nine sixteenths
    return {"Wanda": 2 * forward, "SparseGPT, Ablate": 2 * forward + hessians + solving}


def _rate(dtype: torch.dtype, device: str, size: int = 2048) -> float:
    """Time a square matrix product; return operations a second."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        (a @ b).sum().item()  # the item waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
