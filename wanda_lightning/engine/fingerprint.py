"""What decides the result of a pruning, in a few lines: two runs with the same fingerprint give the same bytes."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.model.offload import stored_parameters
from wanda_lightning.report.environment import installed_versions

SAMPLED = 256
"""Values of each parameter that are looked at: enough to tell models apart, and little to read from a disk."""


def fingerprint(
    model: nn.Module, settings: Mapping[str, Any], calibration: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Describe a run.

    Args:
        model: The model before it is pruned, wherever its weights are.
        settings: Of the pruning, plain types.
        calibration: A digest of each process's calibration batches.
        device: Where batches enter the model.

    Returns:
        Plain values by name.
    """
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for name, values in chain(stored_parameters(model), model.named_buffers()):  # a cast also rounds rotary frequencies
        shapes.update(f"{name} {tuple(values.shape)} {values.dtype};".encode())
        flat = values.detach().reshape(-1)
        weights.update(_bytes(flat[:: max(1, flat.numel() // SAMPLED)]))
    return {
        "model": type(model).__name__,
        "shapes": shapes.hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
        "calibration": [*calibration],
        **settings,
        **_numerics(model, device.type),
        **installed_versions("torch", "transformers", "wanda-lightning"),
    }


class HashedBatches:
    """Calibration batches that are hashed as they pass.

    Args:
        batches: The batches.
        feed: Knows what is in them.
        keep: Whether they are wanted again.

    Attributes:
        kept: Those that have passed, if so.
    """

    def __init__(self, batches: Iterable[Batch], feed: Feed, keep: bool) -> None:
        self._batches, self._feed, self._keep = batches, feed, keep
        self.kept: list[Batch] = []
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self._digest.update(hashed(self._feed.tensors(batch)).encode())
            self.kept += [batch] if self._keep else []
            yield batch

    @property
    def digest(self) -> str:
        """Of the batches that have passed."""
        return self._digest.hexdigest()[:16]


def _numerics(model: nn.Module, device: str) -> dict[str, Any]:
    """Name what else decides the last bits of the activations."""
    return {
        "device": device,
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
    }


def hashed(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a SHA-256 of names, types, shapes and every value, and of a text beside them."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype};".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Say by name where two sets of named values differ."""
    return {
        name: f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now"
        for name in {**found, **wanted}
        if found.get(name) != wanted.get(name)
    }


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
