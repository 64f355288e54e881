"""What pruning refuses before any weight has changed."""

from collections.abc import Iterable

import torch
from torch import nn

from wanda_lightning.engine.journal import Journal
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.offload import is_on_disk, names_without_values
from wanda_lightning.sparsity import Pattern

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_pruning(
    model: nn.Module,
    layers: list[DecoderLayer],
    method: PruningMethod,
    patterns: dict[str, Pattern],
    calibrated: bool,
    journal: "Journal | None",
) -> None:
    """Refuse what cannot work before any weight has changed."""
    for pattern in set(patterns.values()):
        method.check(pattern)
    if not calibrated:
        raise ValueError(f"{method} needs calibration batches, got None")
    linears = [linear for layer in layers for linear in layer.linears]
    if not linears:
        raise ValueError("nothing is left to prune: targets and ignore exclude every linear of the decoder")
    if absent := names_without_values(model):
        raise ValueError(f"{len(absent)} weights were never loaded ({absent[0]}, ...): load the model with its weights")
    if journal is None and any(is_on_disk(layer.module) for layer in layers):
        raise ValueError(
            "the decoder layers are on disk, and what they come from is never written to: give a journal, a folder for "
            "the pruned layers, or load the model with a device_map that leaves none on disk"
        )
    for linear in linears:
        weight = linear.weight.data
        held = weight.dtype if type(weight) is torch.Tensor else type(weight).__name__  # packed, by torchao
        if held not in FLOATS:
            raise ValueError(f"{linear.name} holds {held}, not one of {FLOATS}: prune before quantising")
        patterns[linear.name].check_in_features(linear.weight_OI.shape[1], linear.name)
    check_finite(linear for linear in linears if not linear.weight.is_meta)


def check_finite(linears: Iterable[PrunableLinear]) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ValueError: If there are such, with the linear's name.
    """
    for linear in linears:
        if not torch.isfinite(linear.weight_OI).all():
            raise ValueError(f"{linear.name} has NaN or infinite weights")


def refuse_sharded(model: nn.Module) -> None:
    """Refuse weights of which every process holds a part only.

    Raises:
        ValueError: If there are such.
    """
    if sharded := [name for name, parameter in model.named_parameters() if hasattr(parameter, "placements")]:
        raise ValueError(
            f"{len(sharded)} weights are sharded over processes ({sharded[0]}, ...), and pruning needs them whole: "
            "prune on one device or with DDP, save, and fine-tune the saved model sharded, with SparseFinetuning"
        )
