"""Pruning the linears of one decoder layer, alone or with other processes.

Shapes: O out features, I in features.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from wanda_lightning.calibration.calibrated_layer import CalibratedLayer
from wanda_lightning.calibration.one_pass import NotOnePassError, OnePass, Part
from wanda_lightning.engine.checks import check_finite
from wanda_lightning.engine.linear_pruning import PrunedLayer, PrunedLinear, prune_linear
from wanda_lightning.engine.permuting import permuted
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes, share_statistics
from wanda_lightning.engine.reconstruction import reconstruct
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.offload import is_offloaded
from wanda_lightning.sparsity import sparsity_of
from wanda_lightning.statistics import InputStatistic

log = logging.getLogger(__name__)


class Solution(NamedTuple):
    """What some linears are pruned to, by name.

    Attributes:
        weights: Their pruned weights (O, I).
        masks: What was kept of them, (O, I), True = kept.
        done: What was done to them.
    """

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    done: dict[str, PrunedLinear]


def prune_layer(
    layer: DecoderLayer,
    inputs: CalibratedLayer | None,
    plan: Plan,
    processes: Processes,
) -> PrunedLayer:
    """Prune the linears of a layer in place, and train what is kept if that is asked for.

    Args:
        layer: The layer; its weights are in memory.
        inputs: What enters it; None for methods without calibration.
        plan: What its linears are pruned to, and by what.
        processes: Those that have the other parts of the calibration set.

    Returns:
        What was done.

    Raises:
        ValueError: If weights or inputs are not finite, or a Hessian cannot be factorised; the layer has not changed
            then.
    """
    with processes.together():
        if is_offloaded(layer.module):  # others were looked at before the first layer
            check_finite(layer.linears)
    trained = None
    with permuted(layer, inputs, plan, processes):
        done, masks, passes = _pruned(layer, inputs, plan, processes)
        if plan.reconstruction is not None and inputs is not None:
            trained = reconstruct(inputs, masks, plan.reconstruction, processes)
    return PrunedLayer([_as_it_is_now(linear, done[linear.name], passes) for linear in layer.linears], trained)


def _pruned(
    layer: DecoderLayer, inputs: CalibratedLayer | None, plan: Plan, processes: Processes
) -> tuple[dict[str, PrunedLinear], dict[str, Tensor], int | None]:
    """Prune linears in one pass, if that is planned and the batches stop together; say how many passes it took."""
    if plan.true_sequential and inputs is not None:
        try:
            return *_in_one_pass(layer, inputs, plan, processes), 1
        except NotOnePassError as reason:
            log.info("%s is visited in two passes: %s", layer.name, reason)
    return *_in_two_passes(layer, inputs, plan, processes), None if inputs is None else 2


def _in_one_pass(
    layer: DecoderLayer, inputs: CalibratedLayer, plan: Plan, processes: Processes
) -> tuple[dict[str, PrunedLinear], dict[str, Tensor]]:
    """Prune linears as all batches reach them; afterwards the batches are behind the layer, if it is not trained."""
    assert plan.statistic is not None  # else one pass is not planned
    dense = {linear.name: linear.weight_OI.clone() for linear in layer.linears}
    done: dict[str, PrunedLinear] = {}
    masks: dict[str, Tensor] = {}
    needs_outputs = not inputs.is_last and plan.reconstruction is None
    with closing(OnePass(inputs, plan.statistic, needs_outputs).parts()) as parts:
        try:
            while (part := _next(parts, processes)) is not None:
                found = solve(layer, part.linears, part.statistics, plan, processes)
                put_in_place(part.linears, found.weights)
                done |= found.done
                masks |= found.masks
        except BaseException:
            put_in_place(layer.linears, dense)
            raise
    return done, masks


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
) -> tuple[dict[str, PrunedLinear], dict[str, Tensor]]:
    """Prune all linears with statistics of the layer as it was; the batches are still before it."""

    def collected(linears: list[PrunableLinear]) -> dict[str, InputStatistic]:
        with processes.together():
            return inputs.collect(plan.statistic, linears) if inputs and plan.statistic else {}

    with processes.together():
        parts = inputs.parts(plan.statistic) if inputs and plan.statistic else [layer.linears]
    done: dict[str, PrunedLinear] = {}
    masks: dict[str, Tensor] = {}
    pruned: dict[str, Tensor] = {}
    for linears in parts:
        found = solve(layer, linears, collected(linears), plan, processes)  # statistics of one part at a time
        done |= found.done
        masks |= found.masks
        pruned |= found.weights if len(parts) == 1 else {name: w_OI.cpu() for name, w_OI in found.weights.items()}
    put_in_place(layer.linears, pruned)
    return done, masks


def solve(
    layer: DecoderLayer,
    linears: list[PrunableLinear],
    statistics: dict[str, InputStatistic],
    plan: Plan,
    processes: Processes,
) -> Solution:
    """Prune copies of linears: add statistics up over the processes, solve those of this one, exchange the results.

    Args:
        layer: The layer that the linears are of.
        linears: The linears; they do not change.
        statistics: Of what this process has seen, by name; empty for methods without calibration.
        plan: What they are pruned to, and by what.
        processes: Those that have the other parts of the calibration set.

    Returns:
        What they are pruned to. Masks are there only where the kept weights are to be trained.
    """
    owners = share_statistics(statistics, linears, processes)
    weights = {linear.name: linear.weight_OI.clone() for linear in linears}
    wanted = weights if plan.reconstruction is not None else {}
    masks = {name: torch.zeros_like(weight_OI, dtype=torch.bool) for name, weight_OI in wanted.items()}
    done: dict[str, PrunedLinear] = {}
    with processes.together():
        for linear in linears:
            name = linear.name
            if owners.get(name, processes.rank) == processes.rank:
                done[name], mask_OI = prune_linear(
                    layer.name, linear, weights[name], statistics.get(name), plan.method, plan.patterns[name]
                )
                if masks:
                    masks[name].copy_(mask_OI)
    for name, owner in owners.items():
        weights[name] = processes.send(owner, weights[name])
        if masks:
            masks[name] = processes.send(owner, masks[name].view(torch.uint8)).view(torch.bool)
    for others in processes.gather(done):
        done |= others
    return Solution(weights, masks, done)


def put_in_place(linears: list[PrunableLinear], pruned: Mapping[str, Tensor]) -> None:
    """Change the weights that a layer computes with."""
    for linear in linears:
        linear.weight_OI.copy_(pruned[linear.name])
    torch.clear_autocast_cache()  # it holds copies of the weights in half precision, as they were


def _as_it_is_now(linear: PrunableLinear, done: PrunedLinear, passes: int | None) -> PrunedLinear:
    """Report the zeros that the layer computes with, whatever they were to be."""
    return done._replace(row=replace(done.row, sparsity=sparsity_of(linear.weight_OI), passes=passes))
