"""Pruning a model: whoever has read this file and loop.py knows the house."""

from collections.abc import Iterable, Sequence

from torch import nn

from wanda_lightning.allocation.allocator import Allocator
from wanda_lightning.allocation.by_name import Allocation
from wanda_lightning.allocation.selection import Selection
from wanda_lightning.arguments import instance_or_none
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.feed import Forward
from wanda_lightning.calibration.hidden_states import Place, check_activations
from wanda_lightning.engine.checks import check_pruning
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.left_as_found import left_as_found
from wanda_lightning.engine.loop import Progress, carry_out
from wanda_lightning.engine.permuting import with_neurons
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.engine.settings import PruningSettings
from wanda_lightning.engine.stacks import feed_of, find_layers
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.methods.named import as_method
from wanda_lightning.model.language_model import uncompiled
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Pattern, as_pattern


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
    asked = PruningSettings(
        method=as_method(method),
        pattern=as_pattern(pattern),
        selection=Selection(targets, ignore, layers, allocation),
        exact_error=exact_error,
        true_sequential=true_sequential,
        reconstruction=reconstruction,
        dense_target=dense_target,
        permute=permute,
    )
    return prune_as_asked(
        model,
        calibration,
        asked,
        forward=forward,
        activations=activations,
        journal=journal,
        processes=processes,
        progress=progress,
    )


def prune_as_asked(
    model: nn.Module,
    calibration: Iterable[Batch] | None,
    asked: PruningSettings,
    *,
    forward: Forward | None = None,
    activations: Place = "device",
    journal: Journal | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> PruningReport:
    """Prune a model in place by settings that are one object; the rest is as in :func:`prune_model`.

    Args:
        model: The model.
        calibration: Batches.
        asked: What is asked for, whatever the model.
        forward: Runs the model on a batch.
        activations: A place.
        journal: A journal.
        processes: All of them.
        progress: Shows how far it is.

    Returns:
        What was done to every linear.

    Raises:
        ValueError: If the model or the calibration set cannot be used, see there.
    """
    check_activations(activations)
    instance_or_none("journal", journal, Journal, 'Journal("folder")')
    model, journal, processes = uncompiled(model), journal or Journal.none(), processes or Processes.alone()
    feed = feed_of(model, forward)
    with left_as_found(model), feed.calling():
        found = find_layers(feed, calibration, asked.selection)
        plan = Plan.of(model, asked, found)
        check_pruning(model, plan, calibration is not None, journal)
        plan = with_neurons(plan, model) if plan.permute else plan
        return carry_out(plan, feed, found.calibration, activations, journal, processes, progress)
