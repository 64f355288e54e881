"""Having an allocator decide what each linear is pruned to: once for a run, also if it is cut off and goes on."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from wanda_lightning.allocation.allocator import Task, patterns_of
from wanda_lightning.atomic_files import write_text
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes
from wanda_lightning.model.names import name_without_adapters
from wanda_lightning.report.allotment import Allotment

log = logging.getLogger(__name__)


def allocated(
    plan: Plan,
    feed: Feed,
    batches: Sequence[Batch],
    activations: Place,
    journal: Journal,
    processes: Processes,
) -> Plan:
    """Decide what each linear is pruned to, or find what was decided before the run was cut off.

    Args:
        plan: What is to be done to the model, with an allocator.
        feed: The model, which is left as it was, and how it runs on a batch.
        batches: The calibration set of this process.
        activations: Where its activations wait between two layers.
        journal: Of the run, which has begun; what is decided is kept in it.
        processes: Those that have the other parts of the calibration set.

    Returns:
        The plan with the patterns of all linears.
    """
    allocator, file = plan.selection.allocator, journal.allocation
    assert allocator is not None
    with processes.together():
        found = _decided(file) if processes.rank == 0 and file is not None and file.exists() else None
    if (found := processes.gather(found)[0]) is not None:
        return _with(plan, found)
    task = task_of(plan, feed.model, batches, activations, processes, feed)
    allotment = processes.gather(allocator.allocate(task))[0]
    repeats = {
        name_without_adapters(repeat.name): allotment.patterns[name_without_adapters(repeat.first)]
        for repeat in plan.repeats
    }
    allotment = replace(allotment, patterns={**allotment.patterns, **repeats})
    with processes.together():
        if processes.rank == 0 and file is not None:
            write_text(file, json.dumps(asdict(allotment), indent=2) + "\n")
    return _with(plan, allotment)


def _decided(file: Path) -> Allotment | None:
    """Read what was decided before; None if the file is damaged."""
    try:
        return Allotment(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        log.warning("%s is damaged (%s): it is decided anew how much of each linear is pruned", file, error)
        return None


def _with(plan: Plan, allotment: Allotment) -> Plan:
    return replace(plan, patterns=patterns_of(allotment, plan.linears), allotment=allotment)


def task_of(
    plan: Plan,
    model: nn.Module,
    batches: Sequence[Batch] = (),
    activations: Place = "device",
    processes: Processes | None = None,
    feed: Feed | None = None,
) -> Task:
    """Say what an allocator is to decide."""
    processes = processes or Processes.alone()
    return Task(model, plan.layers, plan.method, plan.pattern, batches, processes, activations, feed, plan.dense_target)
