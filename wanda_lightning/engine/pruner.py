"""Pruning a model: whoever has read this file knows the house."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wanda_lightning.allocation.by_name import Allocation, allocate
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.calibration.walk import CalibratedLayer, walk
from wanda_lightning.engine.checks import check_pruning
from wanda_lightning.engine.clock import PhaseClock
from wanda_lightning.engine.fingerprint import HashedBatches, fingerprint
from wanda_lightning.engine.layer_pruning import prune_layer
from wanda_lightning.engine.measured_sparsity import count_kept, measure_whole_model
from wanda_lightning.engine.processes import Processes
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.model.decoder import DecoderLayer, count_matches, decoder_layers
from wanda_lightning.model.language_model import uncompiled
from wanda_lightning.model.offload import in_memory, is_offloaded, write_back
from wanda_lightning.report.environment import peak_memory
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputHessian

if TYPE_CHECKING:
    from wanda_lightning.engine.journal import Journal

log = logging.getLogger(__name__)


def prune_model(
    model: nn.Module,
    calibration: Iterable[Batch] | None,
    method: PruningMethod,
    pattern: Pattern,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    layers: str | None = None,
    allocation: Allocation | None = None,
    exact_error: bool = False,
    activations: Place = "device",
    journal: "Journal | None" = None,
    processes: Processes | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> PruningReport:
    """Prune the linears of a model's decoder layers in place, layer by layer.

    Each layer is pruned with statistics of the inputs that the already pruned layers before it give
    (Frantar & Alistarh 2023, arXiv:2301.00774; Sun et al. 2023, arXiv:2306.11695). Layers that accelerate keeps on
    disk or in RAM (``device_map``) are in memory one at a time. Of a mixture of experts every expert is pruned with the
    tokens that its router sends to it. An expert that no calibration token reaches is pruned by magnitude within each
    output row, whatever the method; its row in the report says ``tokens=0``.

    Args:
        model: A causal language model of transformers; left in the mode, dtype and device it is in.
        calibration: Batches: input_ids (B, T) int64, or mappings with input_ids and optionally attention_mask
            (0 = padding). May be None for methods without calibration.
        method: Such as ``Wanda()``.
        pattern: ``Unstructured(sparsity)`` or ``SemiStructured(n, m)``.
        targets: Patterns of linear names to prune, see :func:`wanda_lightning.model.decoder.decoder_layers`.
        ignore: Patterns of linear names to leave dense.
        layers: Name of the list of decoder layers, where the rule for finding it fails.
        allocation: Sparsities or ``"n:m"`` patterns by name pattern, which hold instead of ``pattern``; see
            :func:`wanda_lightning.allocation.by_name.allocate`.
        exact_error: Gather X^T X for every method, to report exact reconstruction errors; takes the time of SparseGPT.
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
            if activations overflow in a later layer and not already in the first sequence, with which that is tried.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from wanda_lightning import Unstructured, Wanda
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> batches = [torch.randint(config.vocab_size, (1, 8)) for _ in range(4)]
        >>> report = prune_model(model, batches, Wanda(), Unstructured(0.5))
        >>> report.sparsity
        0.5
    """
    started = time.perf_counter()
    model = uncompiled(model)
    decoder = decoder_layers(model, targets, ignore, layers)
    patterns = allocate([linear for layer in decoder for linear in layer.linears], pattern, allocation)
    wanted = InputHessian if exact_error else method.statistic
    check_pruning(model, decoder, method, {**patterns, "": pattern}, wanted is None or calibration is not None, journal)
    report = PruningReport(str(method), str(pattern), pattern.sparsity)
    report.matches = count_matches(decoder, [*(targets or ()), *(ignore or ()), *(allocation or ())])
    for layer in decoder:
        report.not_pruned |= layer.left_dense
    processes = processes or Processes.alone()
    offloaded = is_offloaded(model)
    settings = {
        "method": str(method),
        "pattern": str(pattern),
        "sparsity": pattern.sparsity,
        "targets": targets,
        "ignore": ignore,
        "layers": layers,
        "allocation": allocation,
        "exact_error": exact_error,
        "processes": processes.size,
    }

    def start(digest: str) -> None:
        digests = processes.gather(digest)
        with processes.together():
            if journal is not None and processes.rank == 0:
                journal.start(fingerprint(model, settings, digests))

    kept_elsewhere = 0
    with torch.inference_mode(False), torch.no_grad(), _left_as_found(model):
        visited = _visit(model, decoder, calibration if wanted else None, activations, start, processes)
        clock = PhaseClock(calibrated=wanted is not None)
        for number, (layer, calibrated) in enumerate(progress(visited, len(decoder)) if progress else visited):
            clock.reached()
            rows = journal.restore(number, layer, processes) if journal else None
            if rows is None:
                memory = _size(layer.module) if offloaded else None
                rows = prune_layer(layer, calibrated, method, patterns, wanted, processes, memory)
                clock.pruned(row.seconds for row in rows)
                if journal is not None:
                    journal.record(number, layer, rows, processes)
            report.linears += rows
            if offloaded:
                write_back(layer.module, layer.weights, journal.file(number) if journal else None)
                kept_elsewhere += count_kept(layer.module)
            clock.left()
    if method.statistic is not None and (unseen := sum(row.tokens == 0 for row in report.linears)):
        log.warning(
            "no calibration token reached %d of %d expert matrices: they were pruned by magnitude within each row. "
            "More calibration samples reach more experts.",
            unseen,
            sum(linear.experts is not None for layer in decoder for linear in layer.linears),
        )
    report.whole_model_sparsity = measure_whole_model(model, kept_elsewhere)
    report.sum_magnitudes()
    report.seconds_by_phase = clock.seconds
    report.memory = peak_memory()
    report.seconds = time.perf_counter() - started
    return report


def _visit(
    model: nn.Module,
    layers: list[DecoderLayer],
    calibration: Iterable[Batch] | None,
    activations: Place,
    start: Callable[[str], None],
    processes: Processes,
) -> Iterator[tuple[DecoderLayer, CalibratedLayer | None]]:
    """Visit the layers, in memory, with what enters them; call ``start`` before, with a digest of the batches."""
    if calibration is None:
        start("")
        for layer in layers:
            with in_memory(layer.module):
                yield layer, None
        return
    batches = HashedBatches(calibration, model)
    steps = walk(model, layers, batches, activations)
    with processes.together():
        first = next(steps)
    start(batches.digest)
    for step in chain([first], steps):
        yield step.layer, step


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and run it uncompiled; restore modes and the random state afterwards."""
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in modules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
