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
    widest = max(plan.linears, key=numbers_a_token)
    waiting, place = inputs.bytes_waiting(numbers_a_token(widest)), inputs.hidden_BTD.place
    stays = place == "device" or called_in_its_own_way(widest)  # what waits before experts is not moved
    if place == "disk" and not stays:
        return None
    devices = {torch.device("cpu")}
    if stays:
        weights = [linear.weight for linear in plan.linears if not linear.weight.is_meta]
        devices = {inputs.hidden_BTD[0].device, *(weight.device for weight in weights)}
    for device in devices:
        free = free_memory(device)
        if free is not None and waiting > free:
            return (
                f"one pass holds the whole calibration set before every linear, {in_bytes(waiting)} at {widest.name}, "
                f"and {in_bytes(free)} are free on {device}"
            )
    return None
