"""Pruning the linears of one decoder layer, alone or with other processes.

Shapes: O out features, I in features.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from wanda_lightning.calibration.walk import CalibratedLayer
from wanda_lightning.engine.checks import check_finite
from wanda_lightning.engine.processes import Processes, combine
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.report.linear_report import LinearReport
from wanda_lightning.report.weight_magnitudes import Magnitudes
from wanda_lightning.sparsity import Pattern, sparsity_of
from wanda_lightning.statistics import InputHessian, InputNorm, InputStatistic


def prune_layer(
    layer: DecoderLayer,
    calibrated: CalibratedLayer | None,
    method: PruningMethod,
    patterns: Mapping[str, Pattern],
    wanted: type[InputStatistic] | None,
    processes: Processes,
    memory: int | None = None,
) -> list[LinearReport]:
    """Prune the linears of a layer in place.

    Args:
        layer: The layer; its weights are in memory.
        calibrated: The layer with what enters it; None for methods without calibration.
        method: The pruning method.
        patterns: By linear name.
        wanted: The statistic to gather.
        processes: Those that have the other parts of the calibration set.
        memory: Of layers that are not always in memory, bytes that Hessians may take at a time; see
            :meth:`CalibratedLayer.passes`.

    Returns:
        A row for each linear.

    Raises:
        ValueError: If weights or inputs are not finite, or a Hessian cannot be factorised; the layer has not changed
            then.
    """
    with processes.together():
        if memory is not None:  # weights that were in memory all the time were looked at before the first layer
            check_finite(layer.linears)
        passes = calibrated.passes(wanted, memory) if calibrated and wanted else [layer.linears]
    rows: dict[str, LinearReport] = {}
    pruned: dict[str, Tensor] = {}  # put in place at the end: every pass sees the layer as it was
    for linears in passes:
        statistics: dict[str, InputStatistic] = {}
        with processes.together():
            if calibrated and wanted:
                statistics = calibrated.collect(wanted, linears)
        owners = combine(statistics, linears, processes)
        with processes.together():
            for linear in linears:
                pruned[linear.name] = linear.weight_OI.clone()
                if owners.get(linear.name, processes.rank) == processes.rank:
                    rows[linear.name] = _prune_linear(
                        layer,
                        linear,
                        pruned[linear.name],
                        statistics.get(linear.name),
                        method,
                        patterns[linear.name],
                    )
        for name, owner in owners.items():
            pruned[name] = processes.send(owner, pruned[name])
        if linears is not passes[-1]:
            pruned = {name: weight_OI.cpu() for name, weight_OI in pruned.items()}
    for linear in layer.linears:
        linear.weight_OI.copy_(pruned[linear.name])
    for others in processes.gather(rows):
        rows |= others
    return [rows[linear.name] for linear in layer.linears]


def _prune_linear(
    layer: DecoderLayer,
    linear: PrunableLinear,
    weight_OI: Tensor,
    statistic: InputStatistic | None,
    method: PruningMethod,
    pattern: Pattern,
) -> LinearReport:
    """Prune a copy of a linear's weight, in place."""
    started = time.perf_counter()
    tolerance = method.tolerance((weight_OI.shape[0], weight_OI.shape[1]))
    try:
        if method.statistic is not None and statistic is not None and statistic.tokens == 0:
            mask_OI = pattern.mask(weight_OI.float().abs())
            weight_OI.masked_fill_(~mask_OI, 0)
            tolerance = 1 / weight_OI.shape[1]
        else:
            given = statistic
            if method.statistic is InputNorm and isinstance(statistic, InputHessian):  # gathered for exact errors
                given = statistic.norm()
            mask_OI = method.prune(weight_OI, given, pattern)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{linear.name} cannot be pruned: {error}") from error
    pattern.check_mask(mask_OI, tolerance)  # which waits for the GPU
    seconds = time.perf_counter() - started
    assert not weight_OI[~mask_OI].any(), f"{linear.name} has weights where its mask has none"
    seen = statistic is not None and statistic.tokens > 0
    magnitudes = Magnitudes()
    magnitudes.count(linear.weight_OI, mask_OI)
    return LinearReport(
        name=linear.name,
        layer=layer.name,
        shape=(weight_OI.shape[0], weight_OI.shape[1]),
        sparsity=sparsity_of(weight_OI),
        seconds=seconds,
        tokens=statistic.tokens if statistic else None,
        error=_relative_error(linear.weight_OI, weight_OI, statistic) if statistic and seen else None,
        error_is_exact=isinstance(statistic, InputHessian),
        damping=statistic.damping if isinstance(statistic, InputHessian) else None,
        magnitudes=magnitudes,
    )


def _relative_error(dense_OI: Tensor, pruned_OI: Tensor, statistic: InputStatistic) -> float:
    """Compute ||(W - W') X||^2 / ||W X||^2 over the calibration set, from the statistic alone."""
    lost = statistic.output_energy(dense_OI - pruned_OI).sum()
    return float(lost / statistic.output_energy(dense_OI).sum().clamp_min(torch.finfo(lost.dtype).tiny))
