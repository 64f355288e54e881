"""What pruning a model would touch and take, without loading it; and how sparse the weights in its folder are.

The model is built on the meta device from its config alone. Shapes: B batch, T tokens, I in features.
"""

import logging
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanda_lightning.commands import run_function
from wanda_lightning.decoder import DecoderLayer, PrunableLinear, coverage, decoder_layers
from wanda_lightning.stored.weights import StoredWeights, stored_weights

GIB = 2**30
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearKind:
    """The linears that have the same place in every layer.

    Attributes:
        name: Their name in a layer, ``*`` for the numbers of experts.
        shape: (out_features, in_features).
        count: How many there are in the model.
        tokens: Share of the tokens that each sees: 1, or less for the experts of a mixture.
        input_group: Number of the group that shares one input tensor, within a layer; None where it is not known.
    """

    name: str
    shape: tuple[int, int]
    count: int
    tokens: float
    input_group: int | None


@dataclass(frozen=True)
class Inspection:
    """What is prunable in a model, and what pruning it would take.

    Attributes:
        model: Class of the model.
        layers: Names of its decoder layers.
        kinds: Its prunable linears.
        left_dense: How many other matrices the decoder has, by the reason they are left dense.
        coverage: Share of the decoder's matrix weights that is prunable.
        parameters: Number of all parameters.
        memory: Bytes by purpose.
        seconds: Estimated time on the device by purpose.
        weights: What the weight files hold, of a folder that has some.
    """

    model: str
    layers: list[str]
    kinds: list[LinearKind]
    left_dense: dict[str, int]
    coverage: float
    parameters: int
    memory: dict[str, int]
    seconds: dict[str, float]
    weights: StoredWeights | None = None

    def to_table(self) -> Any:
        """Return tables for a rich console."""
        from rich.console import Group
        from rich.table import Table

        linears = Table("prunable linear", "out x in", "number", "input")
        for kind in self.kinds:
            group = "" if kind.input_group is None else chr(ord("A") + kind.input_group)
            linears.add_row(kind.name, f"{kind.shape[0]} x {kind.shape[1]}", f"{kind.count}", group)
        costs = Table("estimate", "", title_justify="left")
        for purpose, size in self.memory.items():
            costs.add_row(f"memory: {purpose}", f"{size / GIB:.2f} GiB")
        for purpose, seconds in self.seconds.items():
            costs.add_row(f"time: {purpose}", f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min")
        dense = ", ".join(f"{number} {reason}" for reason, number in self.left_dense.items()) or "none"
        return Group(
            f"{self.model}: {self.parameters / 1e6:,.0f}M parameters, {len(self.layers)} decoder layers "
            f"({self.layers[0]} to {self.layers[-1]})",
            linears,
            "Linears with the same letter share one input, and so one statistic and one factorisation.",
            f"{self.coverage:.2%} of the matrix weights of the decoder layers are prunable; left dense: {dense}",
            costs,
            *([self.weights.to_table()] if self.weights else []),
        )


def inspect_model(
    pretrained: str, num_samples: int = 128, sequence_length: int = 2048, dtype: str = "auto", device: str = "cpu"
) -> Inspection:
    """Look at a model's config: what would be pruned, and what that would take; and at the weights in its folder.

    The weights are read tensor by tensor, so that a model of any size can be looked at.

    Args:
        pretrained: A hub name, of which only the config is read, or a local folder.
        num_samples: Calibration windows.
        sequence_length: Tokens in a window.
        dtype: Data type of weights and activations, such as ``bfloat16``. Default: the checkpoint's.
        device: Where pruning would run; a matrix product is timed there.

    Returns:
        What was found.

    Raises:
        ValueError: If there is no such model, no decoder layers in it, or a weight file is missing or cut off.
    """
    from wanda_lightning.loading import build_skeleton, load_config

    config = load_config(pretrained)
    weights_dtype = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    model = build_skeleton(config, dtype=weights_dtype or torch.float32)
    layers = decoder_layers(model)
    kinds = _kinds(model, layers)
    hidden = model.get_input_embeddings().weight.shape[1]
    left_dense = Counter(reason for layer in layers for reason in layer.left_dense.values())
    return Inspection(
        model=type(model).__name__,
        layers=[layer.name for layer in layers],
        kinds=kinds,
        left_dense=dict(left_dense),
        coverage=coverage(layers),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory=_memory(model, layers, kinds, num_samples * sequence_length * hidden, sequence_length),
        seconds=_seconds(kinds, num_samples * sequence_length, model.dtype, device),
        weights=stored_weights(folder, model, layers) if (folder := Path(pretrained).expanduser()).is_dir() else None,
    )


def _input_groups(model: Any, layer: DecoderLayer) -> dict[str, int]:
    """Number the groups of a layer's linears that share an input tensor, as a forward on the meta device shows them."""
    inputs: list[Any] = []
    groups: dict[str, int] = {}

    def see(name: str, x: Any) -> None:
        if not any(seen is x for seen in inputs):
            inputs.append(x)
        groups[name] = next(number for number, seen in enumerate(inputs) if seen is x)

    single = [linear for linear in layer.linears if linear.expert is None]
    hooks = [
        linear.module.register_forward_pre_hook(lambda _, args, name=linear.name: see(name, args[0]))
        for linear in single
    ]
    try:
        with torch.no_grad():
            ids_BT = torch.zeros(1, 8, dtype=torch.long, device="meta")
            # A mask that is ready-made spares the model a look at values, which meta tensors do not have.
            mask_B1TT = torch.zeros(1, 1, 8, 8, dtype=model.dtype, device="meta")
            model(input_ids=ids_BT, attention_mask=mask_B1TT, use_cache=False)
    except Exception as error:  # some models look all the same
        log.info("which linears share an input is not known: %s", error)
    finally:
        for hook in hooks:
            hook.remove()
    return groups


def _kinds(model: Any, layers: list[DecoderLayer]) -> list[LinearKind]:
    """Count linears by their name within a layer and their shape."""
    groups = _input_groups(model, layers[0])
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    found: dict[tuple[str, tuple[int, int]], list[PrunableLinear]] = {}
    for layer in layers:
        for linear in layer.linears:
            place = re.sub(r"\.\d+(?=\.|$)", ".*", linear.name.removeprefix(f"{layer.name}."))
            shape = (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
            found.setdefault((place, shape), []).append(linear)
    kinds = []
    for (place, shape), linears in found.items():
        experts = len(linears[0].weight) if linears[0].expert is not None else None
        share = chosen / experts if chosen and experts else 1.0
        kinds.append(LinearKind(place, shape, len(linears), share, groups.get(linears[0].name)))
    return kinds


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


def main(arguments: list[str]) -> None:
    """Run ``wanda-lightning inspect``."""
    from rich.console import Console

    inspection = run_function("inspect", inspect_model, arguments)
    Console().print(inspection.to_table())
    if inspection.weights and not inspection.weights.check.loads_whole:
        sys.exit(1)
