"""The memory and time that pruning would take, estimated from shapes and from how fast the device is."""

from typing import Any

import torch

from wanda_lightning.inspection.kinds import LinearKind
from wanda_lightning.inspection.meta_runs import numbers_waiting
from wanda_lightning.inspection.speed import product_rate, sorting_rate
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.experts import numbers_a_token


def estimate_memory(
    model: Any, layers: list[DecoderLayer], kinds: list[LinearKind], windows: int, tokens: int, calls: float
) -> dict[str, int]:
    """Count the bytes that pruning takes, on the device; calibration activations are there, in RAM or on disk.

    Args:
        model: The model, on the meta device.
        layers: Its decoder layers.
        kinds: Its prunable linears.
        windows: Number of calibration windows.
        tokens: Length of a window.
        calls: How often the model calls each of its layers.

    Returns:
        Bytes by purpose.
    """
    size = model.dtype.itemsize
    weights = size * sum(parameter.numel() for parameter in model.parameters())
    by_layer = [size * sum(p.numel() for p in layer.module.parameters()) for layer in layers]
    hidden = model.get_input_embeddings().weight.shape[1]
    activations = size * windows * tokens * hidden
    hessians = 4 * sum(kind.count * kind.shape[1] ** 2 for kind in _one_a_group(kinds))
    hessians //= len(layers) if calls == 1 else 1  # which all wait for the last calls
    widths = sum(kind.count * kind.shape[1] for kind in _one_a_group(kinds)) // len(layers)
    widest = max(kind.shape[1] for kind in kinds)
    waiting = max(numbers_a_token(linear) for layer in layers for linear in layer.linears) + 2 * hidden
    waiting = max(waiting, numbers_waiting(model, layers[0], tokens))
    largest = max(kind.shape[0] * kind.shape[1] for kind in kinds)
    factor = 4 * 2 * widest**2  # with scratch
    batch = size * 4 * tokens * widest
    # A layer's pruned weights are put in place together, so there are two of it. Scores in float32 are sorted, with
    # places in int64; solving holds two copies of a matrix in float32. Streaming has Hessians of a layer's size at a
    # time, or the largest: see CalibratedLayer.parts.
    wanda, solve = max(by_layer) + 20 * largest + batch, max(by_layer) + factor + 8 * largest + batch
    streamed = weights - sum(by_layer) + max(by_layer)
    return {
        "weights of the model": weights,
        "weights of its largest layer": max(by_layer),
        "calibration activations": activations,
        # What entered the layer, and what waits before a linear: see CalibratedLayer.waiting.
        "calibration activations, one pass": activations + size * windows * round(tokens * waiting),
        "SparseGPT, Ablate, besides": hessians + factor,
        "reconstruction, besides": activations + _training(kinds, size, tokens) // len(layers),
        # The dense stream, what enters its linears, and the residual stream twice; seven matrices as wide as the widest
        # linear: three more sums, and the solution without what is held out.
        "dense target, besides": activations + size * windows * tokens * (widths + 2 * hidden) + 4 * 7 * widest**2,
        "Wanda without activations, in memory": weights + wanda,
        "Wanda without activations, streamed": streamed + wanda,
        "SparseGPT without activations, in memory": weights + solve + hessians,
        "SparseGPT without activations, streamed": streamed + solve + min(hessians, max(*by_layer, 4 * widest**2)),
    }


def estimate_seconds(
    model: Any,
    layers: list[DecoderLayer],
    kinds: list[LinearKind],
    windows: int,
    tokens: int,
    calls: float,
    device: torch.device,
) -> dict[str, float]:
    """Divide the operations of pruning by the rates of the device; loading, evaluating and saving are not counted.

    Each layer is passed once, as where the calibration set can wait in memory, if no experts are in a list.

    Args:
        model: The model, on the meta device.
        layers: Its decoder layers.
        kinds: Its prunable linears.
        windows: Number of calibration windows.
        tokens: Length of a window.
        calls: How often the model calls each of its layers.
        device: Where pruning would run; its rates are measured.

    Returns:
        Seconds by method.
    """
    dtype, seen = model.dtype, windows * tokens * calls
    rate = product_rate(dtype, device)
    exact_rate = rate if dtype == torch.float32 else product_rate(torch.float32, device)
    linears = sum(2 * seen * kind.tokens * kind.count * kind.shape[0] * kind.shape[1] for kind in kinds)
    forward = (linears + calls * windows * _attention(model.config.get_text_config(), len(layers), tokens)) / rate
    # Scores are sorted; checking a mask, counting what it removes and measuring the error take as long again.
    masks = 2 * sum(kind.count * kind.shape[0] * kind.shape[1] for kind in kinds) / sorting_rate(device)
    # 1.13: nine sixteenths of the product, which has 2
    sums = 1.13 * sum(seen * kind.tokens * kind.count * kind.shape[1] ** 2 for kind in _one_a_group(kinds))
    hessians = sums / (exact_rate if device.type == "cpu" else rate)
    factors = sum(kind.count * kind.shape[1] ** 3 for kind in _one_a_group(kinds))
    solving = sum(2 * kind.count * kind.shape[0] * kind.shape[1] ** 2 for kind in kinds)
    twice = any(linear.may_be_passed_by for layer in layers for linear in layer.linears)
    wanda = (2 if twice else 1) * forward + masks
    return {"Wanda": wanda, "SparseGPT, Ablate": wanda + hessians + (factors + solving) / exact_rate}


def _attention(config: Any, layers: int, tokens: int) -> int:
    """Count the operations of causal attention in all layers over one window."""
    try:
        return layers * _attention_of_one(config, tokens)
    except RuntimeError:  # by which transformers says that the layers differ in a number
        return sum(_attention_of_one(layer, tokens) for layer in config.per_layer_config)


def _attention_of_one(config: Any, tokens: int) -> int:
    """Count those in one layer; 0 where the config has no heads."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    return 2 * tokens**2 * heads * width  # two products of 2 operations each, over half of the square


def _training(kinds: list[LinearKind], size: int, tokens: int) -> int:
    """Count the bytes that training on one window at a time holds for the linears of all layers.

    Each weight has a mask (1), a gradient and two moments in float32 (12), its best value so far, and a copy in float32
    where it is stored in half precision; what enters and leaves each linear is kept for the backward pass.
    """
    weight = 13 + size + (4 if size < 4 else 0)
    weights = weight * sum(kind.count * kind.shape[0] * kind.shape[1] for kind in kinds)
    return weights + round(size * tokens * sum(kind.tokens * kind.count * sum(kind.shape) for kind in kinds))


def _one_a_group(kinds: list[LinearKind]) -> list[LinearKind]:
    """Keep one of the kinds that share an input: they have one Hessian."""
    return list({kind.name if kind.input_group is None else kind.input_group: kind for kind in kinds}.values())
