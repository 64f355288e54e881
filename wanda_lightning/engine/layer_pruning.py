"""Pruning the linears of one decoder layer, alone or with other processes.

Shapes: O out features, I in features.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from wanda_lightning.calibration.calibrated_layer import CalibratedLayer
from wanda_lightning.calibration.one_pass import NotOnePassError, OnePass, Part
from wanda_lightning.engine.checks import check_finite, check_that_it_can_wait
from wanda_lightning.engine.linear_pruning import PrunedLinear, prune_linear
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes, share_statistics
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.offload import is_offloaded
from wanda_lightning.sparsity import sparsity_of
from wanda_lightning.statistics import InputStatistic

log = logging.getLogger(__name__)


def prune_layer(
    layer: DecoderLayer,
    inputs: CalibratedLayer | None,
    plan: Plan,
    processes: Processes,
) -> list[PrunedLinear]:
    """Prune the linears of a layer in place.

    Args:
        layer: The layer; its weights are in memory.
        inputs: What enters it; None for methods without calibration.
        plan: What its linears are pruned to, and by what.
        processes: Those that have the other parts of the calibration set.

    Returns:
        What was done to each linear.

    Raises:
        ValueError: If weights or inputs are not finite, or a Hessian cannot be factorised; the layer has not changed
            then.
    """
    with processes.together():
        if is_offloaded(layer.module):  # others were looked at before the first layer
            check_finite(layer.linears)
    if plan.true_sequential and inputs is not None and plan.statistic is not None:
        try:
            done = _in_one_pass(layer, inputs, plan.statistic, plan, processes)
        except NotOnePassError as reason:
            log.info("%s is visited in two passes: %s", layer.name, reason)
            done = _in_two_passes(layer, inputs, plan, processes)
    else:
        done = _in_two_passes(layer, inputs, plan, processes)
    return [_as_it_is_now(linear, done[linear.name]) for linear in layer.linears]


def _in_one_pass(
    layer: DecoderLayer,
    inputs: CalibratedLayer,
    statistic: type[InputStatistic],
    plan: Plan,
    processes: Processes,
) -> dict[str, PrunedLinear]:
    """Prune linears as all batches reach them; afterwards the batches are behind the layer."""
    with processes.together():
        check_that_it_can_wait(layer, inputs)
    dense = {linear.name: linear.weight_OI.clone() for linear in layer.linears}
    done: dict[str, PrunedLinear] = {}
    with closing(OnePass(inputs, statistic, not inputs.is_last).parts()) as parts:
        try:
            while (part := _next(parts, processes)) is not None:
                weights, rows = solve(layer, part.linears, part.statistics, plan, processes)
                put_in_place(part.linears, weights)
                done |= {name: each._replace(row=replace(each.row, passes=1)) for name, each in rows.items()}
        except BaseException:
            put_in_place(layer.linears, dense)
            raise
    return done


def _next(parts: Iterator[Part], processes: Processes) -> Part | None:
    """Take the next linears, which all processes have to reach together."""
    with processes.together():
        part = next(parts, None)
    reached = part and [(linear.name, part.statistics[linear.name].is_summed) for linear in part.linears]
    if any(others != reached for others in processes.gather(reached)):
        raise NotOnePassError("processes reach different linears")
    return part


def _in_two_passes(
    layer: DecoderLayer, inputs: CalibratedLayer | None, plan: Plan, processes: Processes
) -> dict[str, PrunedLinear]:
    """Prune all linears with statistics of the layer as it was; the batches are still before it."""
    with processes.together():
        parts = inputs.parts(plan.statistic) if inputs and plan.statistic else [layer.linears]
    done: dict[str, PrunedLinear] = {}
    pruned: dict[str, Tensor] = {}
    for linears in parts:
        weights, rows = _prune_part(layer, linears, inputs, plan, processes)
        done |= rows
        pruned |= weights if len(parts) == 1 else {name: weight_OI.cpu() for name, weight_OI in weights.items()}
    put_in_place(layer.linears, pruned)
    passes = None if inputs is None else 2
    return {name: each._replace(row=replace(each.row, passes=passes)) for name, each in done.items()}


def _prune_part(
    layer: DecoderLayer,
    linears: list[PrunableLinear],
    inputs: CalibratedLayer | None,
    plan: Plan,
    processes: Processes,
) -> tuple[dict[str, Tensor], dict[str, PrunedLinear]]:
    """Gather the statistics of some linears and solve these; return their new weights and what was done, by name."""
    with processes.together():
        statistics = inputs.collect(plan.statistic, linears) if inputs and plan.statistic else {}
    return solve(layer, linears, statistics, plan, processes)


def solve(
    layer: DecoderLayer,
    linears: list[PrunableLinear],
    statistics: dict[str, InputStatistic],
    plan: Plan,
    processes: Processes,
) -> tuple[dict[str, Tensor], dict[str, PrunedLinear]]:
    """Prune copies of linears: add statistics up over the processes, solve those of this one, exchange the results.

    Args:
        layer: The layer that the linears are of.
        linears: The linears; they do not change.
        statistics: Of what this process has seen, by name; empty for methods without calibration.
        plan: What they are pruned to, and by what.
        processes: Those that have the other parts of the calibration set.

    Returns:
        The pruned weights, and what was done, both by name.
    """
    owners = share_statistics(statistics, linears, processes)
    weights = {linear.name: linear.weight_OI.clone() for linear in linears}
    done: dict[str, PrunedLinear] = {}
    with processes.together():
        for linear in linears:
            name = linear.name
            if owners.get(name, processes.rank) == processes.rank:
                done[name] = prune_linear(
                    layer.name, linear, weights[name], statistics.get(name), plan.method, plan.patterns[name]
                )
    for name, owner in owners.items():
        weights[name] = processes.send(owner, weights[name])
    for others in processes.gather(done):
        done |= others
    return weights, done


def put_in_place(linears: list[PrunableLinear], pruned: Mapping[str, Tensor]) -> None:
    """Change the weights that a layer computes with."""
    for linear in linears:
        linear.weight_OI.copy_(pruned[linear.name])
    torch.clear_autocast_cache()  # it holds copies of the weights in half precision, as they were


def _as_it_is_now(linear: PrunableLinear, done: PrunedLinear) -> PrunedLinear:
    """Report the zeros that the layer computes with, whatever they were to be."""
    return done._replace(row=replace(done.row, sparsity=sparsity_of(linear.weight_OI)))
