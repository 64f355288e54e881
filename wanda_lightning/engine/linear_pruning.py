"""Pruning one linear, and what there is to say of it.

Shapes: O out features, I in features.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from wanda_lightning.calibration.input_drift import InputDrift
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.methods.magnitude import MagnitudeInRows
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.report.layer_reconstruction import LayerReconstruction
from wanda_lightning.report.linear_report import LinearReport
from wanda_lightning.report.weight_magnitudes import Magnitudes
from wanda_lightning.sparsity import Pattern, sparsity_of
from wanda_lightning.statistics import InputHessian, InputNorm, InputStatistic


class PrunedLinear(NamedTuple):
    """What was done to one linear.

    Attributes:
        row: Its row in the report.
        magnitudes: How large its kept and its pruned weights were.
    """

    row: LinearReport
    magnitudes: Magnitudes


class PrunedLayer(NamedTuple):
    """What was done to the linears of one layer.

    Attributes:
        linears: To each of them.
        reconstruction: How what was kept was trained; None where it was not.
    """

    linears: list[PrunedLinear]
    reconstruction: LayerReconstruction | None = None


def prune_linear(
    layer: str,
    linear: PrunableLinear,
    weight_OI: Tensor,
    statistic: InputStatistic | None,
    method: PruningMethod,
    pattern: Pattern,
) -> tuple[PrunedLinear, Tensor]:
    """Prune a copy of a linear's weight, in place.

    Args:
        layer: Name of the decoder layer.
        linear: The linear; its own weight does not change.
        weight_OI: The copy.
        statistic: Of its inputs; None for methods without calibration. Where it is empty, because the router sent no
            token to an expert, the smallest weights of each row go, whatever the method.
        method: The pruning method.
        pattern: What it is pruned to.

    Returns:
        What was done, and the mask (O, I), True = kept.

    Raises:
        ValueError: If the Hessian cannot be factorised, or the method does not do what it says.
    """
    started = time.perf_counter()
    dense_target = None
    if isinstance(statistic, InputDrift):
        dense_target = _aim_at_dense(linear.name, weight_OI, statistic)
    aim_OI = weight_OI.clone() if dense_target else linear.weight_OI
    given = statistic
    if method.statistic is not None and statistic is not None and statistic.tokens == 0:
        method = MagnitudeInRows()
    elif method.statistic is InputNorm and isinstance(statistic, InputHessian):  # gathered for exact errors
        given = statistic.norm()
    try:
        mask_OI = method.prune(weight_OI, given, pattern)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{linear.name} cannot be pruned: {error}") from error
    _check(linear.name, method, weight_OI, mask_OI, pattern)  # which waits for the GPU
    seconds = time.perf_counter() - started
    magnitudes = Magnitudes()
    magnitudes.count(linear.weight_OI, mask_OI)
    row = LinearReport(
        name=linear.name,
        layer=layer,
        shape=(weight_OI.shape[0], weight_OI.shape[1]),
        sparsity=sparsity_of(weight_OI),
        seconds=seconds,
        tokens=statistic.tokens if statistic else None,
        error=_relative_error(aim_OI, weight_OI, statistic) if statistic and statistic.tokens else None,
        error_is_exact=isinstance(statistic, InputHessian),
        damping=statistic.damping if isinstance(statistic, InputHessian) else None,
        dense_target=dense_target,
    )
    return PrunedLinear(row, magnitudes), mask_OI


def _check(name: str, method: PruningMethod, weight_OI: Tensor, mask_OI: Tensor, pattern: Pattern) -> None:
    """Hold a method, which may be the user's own, to what it says."""
    try:
        wanted = f"torch.bool {tuple(weight_OI.shape)}"
        got = f"{mask_OI.dtype} {tuple(mask_OI.shape)}" if isinstance(mask_OI, Tensor) else type(mask_OI).__name__
        if got != wanted:
            raise ValueError(f"its mask has to be {wanted}, got {got}")
        pattern.check_mask(mask_OI, method.tolerance((weight_OI.shape[0], weight_OI.shape[1])))
        if (weight_OI.bool() > mask_OI).any():
            raise ValueError("it leaves weights where its mask has none")
        if not torch.stack(torch.aminmax(weight_OI)).isfinite().all():
            raise ValueError(f"it gives weights that are NaN or infinite in {weight_OI.dtype}")
    except ValueError as error:
        raise ValueError(f"{name} cannot be pruned with {method}: {error}") from error


def _aim_at_dense(name: str, weight_OI: Tensor, statistic: InputDrift) -> float | None:
    """Move a weight, in place, to where it gives what the dense model gives; return how much of the way was gone."""
    try:
        target = statistic.target(name, weight_OI)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{name} cannot be fitted to the dense model: {error}") from error
    if target is None:
        return None
    weight_OI.copy_(target[0])
    return target[1]


def _relative_error(dense_OI: Tensor, pruned_OI: Tensor, statistic: InputStatistic) -> float:
    """Compute ||(W - W') X||^2 / ||W X||^2 over the calibration set, from the statistic alone."""
    lost = statistic.output_energy(dense_OI - pruned_OI).sum()
    return float(lost / statistic.output_energy(dense_OI).sum().clamp_min(torch.finfo(lost.dtype).tiny))
