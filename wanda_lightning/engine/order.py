"""How often the calibration set goes through a layer: once where it can wait in the middle of one, else twice."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch

from wanda_lightning.calibration.calibrated_layer import CalibratedLayer
from wanda_lightning.calibration.free_memory import free_memory
from wanda_lightning.engine.checks import check_inputs
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.experts import called_in_its_own_way, numbers_a_token
from wanda_lightning.model.held import Held
from wanda_lightning.report.tables import in_bytes

log = logging.getLogger(__name__)

Visit = tuple[DecoderLayer, CalibratedLayer | None]
"""A layer, and what enters it if there are batches."""


def begin(plan: Plan, visits: Iterator[Visit], processes: Processes) -> tuple[Plan, Iterator[Visit]]:
    """Begin to visit the layers, and decide how often each is passed.

    Args:
        plan: What is to be done.
        visits: The layers; the first step reads the batches, and tries the model with them.
        processes: Those that have the other parts of the calibration set.

    Returns:
        The plan, with the order in it, and all the visits.

    Raises:
        ValueError: If the batches do not do, see :func:`check_inputs`, or the memory does not for what is asked for.
    """
    with processes.together():
        first = next(visits)
        check_inputs(plan, first[1])
    return _decide(plan, first[1], processes), chain([first], visits)


def _decide(plan: Plan, inputs: CalibratedLayer | None, processes: Processes) -> Plan:
    """Decide whether a layer is passed once or twice, where that was left open.

    Args:
        plan: What is asked for.
        inputs: What enters the first layer; None without calibration.
        processes: Those that have the other parts of the calibration set; all of them decide alike.

    Returns:
        The plan, with the order in it.

    Raises:
        ValueError: If one pass is asked for and the calibration set cannot wait before the widest linear, with what
            helps.
    """
    if inputs is None or plan.statistic is None or plan.true_sequential is False:
        return replace(plan, true_sequential=False)
    with processes.together():
        lack = _lack_of_memory(plan, inputs)
        if lack and plan.true_sequential:
            raise ValueError(
                f"{lack}: use fewer samples, activations='cpu' or 'disk', or true_sequential=False, which takes two "
                "passes"
            )
    lacks = [each for each in processes.gather(lack) if each]
    if lacks and plan.dense_target:
        raise ValueError(
            f"dense_target needs one pass, and {lacks[0]}: use fewer samples, or activations='cpu' or 'disk'"
        )
    if lacks:
        log.warning("every layer is passed twice: %s", lacks[0])
    return replace(plan, true_sequential=not lacks)


def _lack_of_memory(plan: Plan, inputs: CalibratedLayer) -> str | None:
    """Say what does not fit where; None if all of it fits, or nobody can tell."""
    place, cpu = inputs.hidden_BTD.place, torch.device("cpu")
    weights = [linear.weight for linear in plan.linears if not linear.weight.is_meta]
    devices = {inputs.hidden_BTD[0].device, *(weight.device for weight in weights)}
    most: dict[torch.device, tuple[int, str]] = {}
    for name, held in _waiting(plan, inputs):
        moved = 0 if place == "device" else held.entering
        needs = dict.fromkeys(devices, held.nbytes - moved)
        if place == "cpu":
            needs[cpu] = needs.get(cpu, 0) + moved
        for device, needed in needs.items():
            most[device] = max(most.get(device, (0, "")), (needed, name))
    for device, (needed, name) in most.items():
        free = free_memory(device)
        if free is not None and needed > free:
            return (
                f"one pass holds the whole calibration set before every linear, {in_bytes(needed)} at {name}, and "
                f"{in_bytes(free)} are free on {device}"
            )
    return None


def _waiting(plan: Plan, inputs: CalibratedLayer) -> Iterator[tuple[str, Held]]:
    """Yield what is held before linears of the first layer, as measured, and before the widest, two hidden states."""
    first = {linear.name: linear for linear in inputs.layer.linears}
    for name, held in inputs.waiting().items():
        stays = first[name].expert is not None  # what waits before experts is not moved
        yield name, Held(held.nbytes, 0) if stays else held
    widest = max(plan.linears, key=numbers_a_token)
    if widest.name not in first:
        width, stays = numbers_a_token(widest), called_in_its_own_way(widest)
        tokens = sum(x.numel() // x.shape[-1] * x.itemsize for x in inputs.hidden_BTD.shapes)
        hidden = 2 * inputs.hidden_BTD.shapes[0].shape[-1]
        yield widest.name, Held(tokens * (width + hidden), 0 if stays else tokens * width)
