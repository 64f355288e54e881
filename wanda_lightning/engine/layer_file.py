"""The file of a finished layer: its pruned weights, the rows of its report, and a digest that tells of damage."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanda_lightning.atomic_files import whole_file
from wanda_lightning.engine.fingerprint import hashed
from wanda_lightning.engine.linear_pruning import PrunedLayer, PrunedLinear
from wanda_lightning.report.layer_reconstruction import LayerReconstruction
from wanda_lightning.report.linear_report import LinearReport
from wanda_lightning.report.weight_magnitudes import Magnitudes


def write(file: Path, weights: Mapping[str, Tensor], done: PrunedLayer) -> None:
    """Write a layer, whole and to the disk.

    Args:
        file: Where it goes.
        weights: Its weights by name, pruned.
        done: What was done to it.

    Raises:
        OSError: If it cannot be written; or safetensors' own error.
    """
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    described = json.dumps([asdict(row) | {"magnitudes": asdict(magnitudes)} for row, magnitudes in done.linears])
    metadata = {"rows": described}
    if done.reconstruction:
        metadata["reconstruction"] = json.dumps(asdict(done.reconstruction))
    metadata["sha256"] = _digest(tensors, metadata)
    with whole_file(file) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)


def read(file: Path) -> tuple[dict[str, Tensor], PrunedLayer]:
    """Read a layer.

    Args:
        file: What :func:`write` wrote.

    Returns:
        The weights by name, and what was done to the layer.

    Raises:
        ValueError: If the file is damaged; or another error, depending on where.
    """
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        metadata = stored.metadata() or {}
    if _digest(tensors, metadata) != metadata["sha256"]:
        raise ValueError("its content is not what was written")
    linears = [
        PrunedLinear(LinearReport.from_dict(row), Magnitudes.from_dict(row["magnitudes"]))
        for row in json.loads(metadata["rows"])
    ]
    trained = metadata.get("reconstruction")
    return tensors, PrunedLayer(linears, LayerReconstruction(**json.loads(trained)) if trained else None)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return hashed(tensors, metadata["rows"] + metadata.get("reconstruction", ""))
