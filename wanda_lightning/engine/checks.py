"""What pruning refuses before any weight has changed."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from wanda_lightning.calibration.calibrated_layer import CalibratedLayer
from wanda_lightning.calibration.input_drift import held_out_for_target
from wanda_lightning.engine.allocating import task_of
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.plan import Plan
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.offload import is_on_disk, names_without_values

PRUNABLE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def check_pruning(model: nn.Module, plan: Plan, has_batches: bool, journal: Journal) -> None:
    """Refuse what cannot work before any weight has changed.

    Args:
        model: The model.
        plan: What is to be done to it.
        has_batches: Whether there is a calibration set.
        journal: Where finished layers are kept.

    Raises:
        ValueError: If something cannot work.
    """
    for pattern in {*plan.patterns.values()}:
        plan.method.check(pattern)
    if plan.asks_for_batches and not has_batches:
        raise ValueError(f"{plan.asks_for_batches} needs calibration batches, got None")
    if (plan.reconstruction is not None or plan.dense_target) and plan.repeats:
        name, _, first = plan.repeats[0]
        setting = "dense_target" if plan.dense_target else "reconstruction"
        raise ValueError(
            f"{name} and {first} share one matrix: what the dense layers give is not known any more once it is pruned, "
            f"and {setting} needs that; leave {setting} out"
        )
    if not plan.linears:
        left = Counter(reason for layer in plan.layers for reason in layer.left_dense.values())
        said = ", ".join(f"{number} {reason}" for reason, number in left.items())
        raise ValueError(f"nothing is left to prune of the decoder's matrices ({said}): say other targets or ignore")
    if absent := names_without_values(model):
        raise ValueError(
            f"{len(absent)} weights or buffers were never loaded ({absent[0]}, ...): load the model with all of them, "
            "as from_pretrained does"
        )
    if journal.file(0) is None and any(is_on_disk(layer.module) for layer in plan.layers):
        raise ValueError(
            "the decoder layers are on disk, and what they come from is never written to: give a journal, a folder for "
            "the pruned layers, or load the model with a device_map that leaves none on disk"
        )
    if plan.asks_for_batches:
        _refuse_adapted(model, plan.linears)
    for linear in plan.linears:
        _check_stored(linear)
        plan.patterns[linear.name].check_in_features(linear.weight_OI.shape[1], linear.name)
    check_finite(linear for linear in plan.linears if not linear.weight.is_meta)
    if plan.selection.allocator is not None:
        plan.selection.allocator.check(task_of(plan, model))


def check_inputs(plan: Plan, inputs: CalibratedLayer | None) -> None:
    """Refuse a calibration set that does not do for what is to be done, before any weight has changed.

    Args:
        plan: What is to be done.
        inputs: What enters the first layer; None without calibration.

    Raises:
        ValueError: If there are too few batches.
    """
    if plan.dense_target and inputs is not None:
        held_out_for_target(len(inputs.hidden_BTD))
    if plan.reconstruction is not None and inputs is not None:
        plan.reconstruction.split(len(inputs.hidden_BTD))


def _refuse_adapted(model: nn.Module, linears: Iterable[PrunableLinear]) -> None:
    """Refuse parameters that peft adapts by themselves, such as fused experts: calls see another weight."""
    around: Any = [module for module in model.modules() if "base_layer" in module._modules]
    adapted = {(each.get_base_layer(), each.parameter_name) for each in around if hasattr(each, "parameter_name")}
    for linear in linears:
        if (linear.module, linear.parameter) in adapted:
            raise ValueError(
                f"{linear.name} has an adapter of its own (target_parameters), which computes the weight anew for "
                "every call: prune before adapters are added, or leave it out with ignore"
            )


def _check_stored(linear: PrunableLinear) -> None:
    """Refuse a weight that is computed for every call, or packed: what is written to it would be lost."""
    if not linear.is_stored:
        raise ValueError(
            f"the weight of {linear.name} is computed from other parameters, and the next call would undo the pruning: "
            "make it an ordinary weight first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
            "remove_spectral_norm or prune.remove), or leave it out with ignore"
        )
    weight = linear.weight.data
    held = weight.dtype if type(weight) is torch.Tensor else type(weight).__name__  # torchao's say that they are floats
    if held not in PRUNABLE:
        raise ValueError(f"{linear.name} holds {held}, not floating-point weights: prune before quantising")


def check_finite(linears: Iterable[PrunableLinear]) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        linears: The linears that are to be pruned.

    Raises:
        ValueError: If there are such, with the linear's name.
    """
    for linear in linears:
        extremes = torch.stack(torch.aminmax(linear.weight_OI))  # which NaN spreads to: many times as fast as a mask
        if not extremes.isfinite().all():
            raise ValueError(f"{linear.name} has NaN or infinite weights")


def refuse_sharded(model: nn.Module) -> None:
    """Refuse weights of which every process holds a part only.

    Args:
        model: The model.

    Raises:
        ValueError: If there are such.
    """
    if sharded := [name for name, parameter in model.named_parameters() if hasattr(parameter, "placements")]:
        raise ValueError(
            f"{len(sharded)} weights are sharded over processes ({sharded[0]}, ...), and pruning needs them whole: "
            "prune on one device or with DDP, save, and fine-tune the saved model sharded, with SparseFinetuning"
        )
