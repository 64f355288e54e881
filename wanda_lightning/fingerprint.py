"""What decides the result of a pruning, in a few lines: two runs with the same fingerprint give the same bytes."""

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.offload import stored_parameters

SAMPLED = 256
"""Values of each parameter that are looked at: enough to tell models apart, and little to read from a disk."""


def of_model(model: nn.Module) -> dict[str, str]:
    """Return the class, a hash of names, shapes and dtypes, and one of a sample of the weights."""
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for name, values in stored_parameters(model):
        shapes.update(f"{name} {tuple(values.shape)} {values.dtype};".encode())
        flat = values.detach().reshape(-1)
        weights.update(_bytes(flat[:: max(1, flat.numel() // SAMPLED)]))
    return {"model": type(model).__name__, "shapes": shapes.hexdigest()[:16], "weights": weights.hexdigest()[:16]}


def of_versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    versions = {}
    for package in ("torch", "transformers", "wanda-lightning"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # used from a folder, without being installed
            continue
    return versions


def hashed(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of names, types, shapes and every value."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype};".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say where two sets of named values differ."""
    names: Iterable[str] = {**found, **wanted}
    return [
        f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
