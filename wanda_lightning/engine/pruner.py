"""Pruning a model: whoever has read this file knows the house."""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

from torch import nn

from wanda_lightning.allocation.allocator import Allocator
from wanda_lightning.allocation.by_name import Allocation
from wanda_lightning.allocation.selection import Selection
from wanda_lightning.arguments import instance_or_none
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.feed import Feed, Forward
from wanda_lightning.calibration.hidden_states import Place, check_activations
from wanda_lightning.calibration.walk import walk
from wanda_lightning.engine.allocating import allocated
from wanda_lightning.engine.checks import check_pruning
from wanda_lightning.engine.clock import PhaseClock
from wanda_lightning.engine.fingerprint import HashedBatches, fingerprint
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.layer_pruning import prune_layer
from wanda_lightning.engine.left_as_found import left_as_found
from wanda_lightning.engine.measured_sparsity import ZeroCount
from wanda_lightning.engine.order import Visit, begin
from wanda_lightning.engine.permuting import with_neurons
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.engine.stacks import feed_of, find_layers
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.methods.named import as_method
from wanda_lightning.model.language_model import uncompiled
from wanda_lightning.model.offload import in_memory, write_back
from wanda_lightning.report.environment import peak_memory
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Pattern, as_pattern

log = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps the iteration over so many steps, to show how far it is."""


def prune_model(
    model: nn.Module,
    calibration: Iterable[Batch] | None,
    method: PruningMethod | str,
    pattern: Pattern | str | float,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    allocation: Allocation | Allocator | None = None,
    exact_error: bool = False,
    true_sequential: bool | None = None,
    reconstruction: Reconstruction | None = None,
    dense_target: bool = False,
    permute: bool = False,
    activations: Place = "device",
    journal: Journal | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> PruningReport:
    """Prune the linears of a model's layers in place, layer by layer.

    Each layer is pruned with statistics of the inputs that the already pruned layers before it give
    (Frantar & Alistarh 2023, arXiv:2301.00774; Sun et al. 2023, arXiv:2306.11695). Layers that accelerate keeps on
    disk or in RAM (``device_map``) are in memory one at a time. Every expert of a mixture is pruned with the tokens
    that its router sends to it. An expert that no calibration token reaches is pruned by magnitude within each output
    row, whatever the method; its row in the report says ``tokens=0``. A matrix that several linears share is pruned
    once, with the inputs of the first.

    Args:
        model: A causal language model of transformers, or any module that calls layers one after another; left in the
            mode, dtype and device it is in.
        calibration: Batches: input_ids (B, T) int64 or int32, or mappings with input_ids and optionally attention_mask
            (0 = padding); of other models than language models, whatever ``forward`` takes. May be None for methods
            without calibration.
        method: Such as ``Wanda()``, or the name of one: ``"magnitude"``, ``"wanda"``, ``"sparsegpt"``, ``"ablate"``,
            ``"admm"`` or ``"ria"``.
        pattern: ``Unstructured(sparsity)`` or ``SemiStructured(n, m)``; a sparsity in [0, 1), or ``"n:m"``, will do.
        targets: Patterns of linear names to prune, see :func:`wanda_lightning.model.decoder.decoder_layers`.
        ignore: Patterns of linear names to leave dense.
        layers: Name of the list of layers, where the rule for finding it fails, or names of several lists. Default: of
            a language model its decoder's; of other models all lists of layers that are called one after another.
        forward: Runs the model on a batch, such as ``lambda model, batch: model(batch["image"])``. Default: a language
            model gets token ids; others get mappings as keyword arguments, a tensor, or the first of a tuple or list.
        allocation: Sparsities or ``"n:m"`` patterns by name pattern, which hold instead of ``pattern``, see
            :func:`wanda_lightning.allocation.by_name.allocate`; or what splits the sparsity among the linears by
            looking at the dense model, such as ``OWL()``.
        exact_error: Gather X^T X for every method, to report exact reconstruction errors; takes the time of SparseGPT.
        true_sequential: Prune each linear with what the pruned linears before it give, also those of its own layer, as
            GPTQ's setting of this name does (arXiv:2210.17323). All batches advance through a layer together, so one
            pass is enough. False: two passes, one for the statistics of the whole layer and one for its outputs, as
            the published code has it. Default: one pass, or two where the memory does not suffice for one.
        reconstruction: Train what is kept of each layer, so that the layer gives what it gave in the dense model.
        dense_target: Prune, in place of each weight, one that makes up for what has been pruned before it, as far as
            that serves calibration batches that were held out; see :mod:`wanda_lightning.solvers.dense_target`. Needs
            one pass.
        permute: Let the neurons of each MLP first stand in an order in which an N:M pattern of the matrix that reads
            them loses less; see :mod:`wanda_lightning.engine.permuting`. N:M patterns only.
        activations: Where the activations of the calibration set wait between two layers: ``"device"``, ``"cpu"`` or
            ``"disk"``.
        journal: Keeps every finished layer on disk. Where it holds layers of the same pruning already, it goes on
            behind them. Needed where the model's layers are on disk: then it holds their pruned weights, and has to
            stay until the model is saved.
        processes: Where each has a part of the calibration set: ``Processes()``. All of them end with the same model.
        progress: Wraps the iteration over layers, given it and its length, to show how far it is.

    Returns:
        What was done to every linear.

    Raises:
        ValueError: If an argument, the model or the calibration set cannot be used; no weight has changed then, except
            if activations overflow in a later layer and not already in the first tokens (in float16, the first
            sequence), with which that is tried, or if a linear of a later layer is never called.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        >>> batches = list(torch.randint(0, 100, (4, 2, 16)))
        >>> prune_model(LlamaForCausalLM(config), batches, "wanda", 0.5).sparsity
        0.5
    """
    method, pattern = as_method(method), as_pattern(pattern)
    check_activations(activations)
    instance_or_none("reconstruction", reconstruction, Reconstruction, "Reconstruction(epochs=3)")
    instance_or_none("journal", journal, Journal, 'Journal("folder")')
    model, journal, processes = uncompiled(model), journal or Journal.none(), processes or Processes.alone()
    feed = feed_of(model, forward)
    with left_as_found(model), feed.calling():
        found = find_layers(feed, calibration, Selection(targets, ignore, layers, allocation))
        plan = Plan.of(
            model,
            method,
            pattern,
            found,
            exact_error=exact_error,
            true_sequential=true_sequential,
            reconstruction=reconstruction,
            dense_target=dense_target,
        )
        check_pruning(model, plan, calibration is not None, journal)
        plan = with_neurons(plan, model) if permute else plan
        return carry_out(plan, feed, found.calibration, activations, journal, processes, progress)


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
        calibration: See :func:`prune_model`, as the following.
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
    if calibration is not None and plan.needs_batches:
        batches = HashedBatches(calibration, feed, keep=bool(allocator))
    with closing(_visit(plan, feed, batches, activations)) as walked:  # a layer is in memory, after errors too
        plan, visits = begin(plan, clock.forwards(walked), processes)  # the first visit reads the batches
        settings = {**plan.settings, **(asked or {}), "processes": processes.size}
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
