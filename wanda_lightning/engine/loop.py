"""The loop over the layers: restore each from the journal, or prune it; then report."""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from typing import Any

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.calibration.walk import walk
from wanda_lightning.engine.allocating import allocated
from wanda_lightning.engine.clock import PhaseClock
from wanda_lightning.engine.fingerprint import HashedBatches, fingerprint
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.layer_pruning import prune_layer
from wanda_lightning.engine.measured_sparsity import ZeroCount
from wanda_lightning.engine.order import Visit, begin
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes
from wanda_lightning.model.offload import in_memory, write_back
from wanda_lightning.report.environment import peak_memory
from wanda_lightning.report.pruning_report import PruningReport

log = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps the iteration over so many steps, to show how far it is."""


def carry_out(
    plan: Plan,
    feed: Feed,
    calibration: Iterable[Batch] | None,
    activations: Place,
    journal: Journal,
    processes: Processes,
    progress: Progress | None,
    asked: Mapping[str, Any] | None = None,
) -> PruningReport:
    """Do what is planned, layer by layer.

    Args:
        plan: What is to be done, checked.
        feed: The model, in eval mode, and how it runs on a batch.
        calibration: See :func:`~wanda_lightning.prune_model`, as the following.
        activations: A place.
        journal: A journal.
        processes: All of them.
        progress: Shows how far it is.
        asked: What decides the result beside the plan's settings.

    Returns:
        What was done to every linear.
    """
    clock, zeros, allocator = PhaseClock(), ZeroCount(feed.model), plan.selection.allocator
    batches = None
    if calibration is not None and plan.asks_for_batches:
        batches = HashedBatches(calibration, feed, keep=bool(allocator))
    with closing(_visit(plan, feed, batches, activations)) as walked:  # a layer is in memory, after errors too
        plan, visits = begin(plan, clock.forwards(walked), processes)  # the first visit reads the batches
        settings = {**plan.described(), **(asked or {}), "processes": processes.size}
        digests = processes.gather(batches.digest if batches else "")
        journal.start(fingerprint(feed.model, settings, digests, feed.device), processes)
        if allocator:
            with clock.counted("allocation"):
                kept = batches.kept if batches else []
                plan = allocated(plan, feed, kept, activations, journal, processes)
        report = plan.new_report()
        for number, (layer, inputs) in enumerate(progress(visits, len(plan.layers)) if progress else visits):
            done = journal.restore(number, layer, processes)
            if done is None:
                with clock.counted("statistics"):
                    done = prune_layer(layer, inputs, plan, processes)
                clock.spent("solve", (linear.row.seconds for linear in done.linears))
                clock.spent("reconstruction", [done.reconstruction.seconds] if done.reconstruction else [])
                journal.record(number, layer, done, processes)
            report.add(done.linears)
            if done.reconstruction:
                report.reconstruction[layer.name] = done.reconstruction
            write_back(layer.module, layer.weights, journal.file(number))
            zeros.visit(layer.module)
        report.repeat(plan.repeats)
        _say_what_was_not_reached(plan, report)
        report.whole_model_sparsity = zeros.sparsity
        report.seconds, report.seconds_by_phase, report.memory = clock.total, clock.seconds, peak_memory()
    return report


def _visit(plan: Plan, feed: Feed, batches: HashedBatches | None, activations: Place) -> Generator[Visit]:
    """Visit the layers in order, each in memory, with what the plan takes of batches, if there are some."""
    if batches is None:
        for layer in plan.layers:
            with in_memory(layer.module):
                yield layer, None
    else:
        for step in walk(
            feed.model,
            plan.layers,
            batches,
            activations,
            with_dense=plan.reconstruction is not None,
            with_dense_inputs=plan.dense_target,
            feed=feed,
            statistic=plan.statistic,
        ):
            yield step.layer, step


def _say_what_was_not_reached(plan: Plan, report: PruningReport) -> None:
    experts = sum(linear.experts is not None for linear in plan.linears)
    if plan.method.statistic is not None and (unseen := sum(row.tokens == 0 for row in report.linears)):
        log.warning(
            "no calibration token reached %d of %d expert matrices: they were pruned by magnitude within each row. "
            "More calibration samples reach more experts.",
            unseen,
            experts,
        )
