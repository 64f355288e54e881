"""Pruning a model: whoever has read this file knows the house."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.allocation import Allocation, allocate
from wanda_lightning.calibration import Batch, walk
from wanda_lightning.decoder import DecoderLayer, PrunableLinear, count_matches, decoder_layers, uncompiled
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.report import LinearReport, PruningReport, whole_model_sparsity
from wanda_lightning.sparsity import Pattern, sparsity_of
from wanda_lightning.statistics import InputHessian, InputStatistic

Statistics = dict[str, InputStatistic]

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
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> PruningReport:
    """Prune the linears of a model's decoder layers in place, layer by layer.

    Each layer is pruned with statistics of the inputs that the already pruned layers before it give
    (Frantar & Alistarh 2023, arXiv:2301.00774; Sun et al. 2023, arXiv:2306.11695). Of a mixture of experts every
    expert is pruned with the tokens that its router sends to it. An expert that no calibration token reaches is pruned
    by magnitude within each output row, whatever the method; its row in the report says ``tokens=0``.

    Args:
        model: A causal language model of transformers; left in the mode, dtype and device it is in.
        calibration: Batches: input_ids (B, T) int64, or mappings with input_ids and optionally attention_mask
            (0 = padding). May be None for methods without calibration.
        method: Such as ``Wanda()``.
        pattern: ``Unstructured(sparsity)`` or ``SemiStructured(n, m)``.
        targets: Patterns of linear names to prune, see :func:`wanda_lightning.decoder.decoder_layers`.
        ignore: Patterns of linear names to leave dense.
        layers: Name of the list of decoder layers, where the rule for finding it fails.
        allocation: Sparsities or ``"n:m"`` patterns by name pattern, which hold instead of ``pattern``; see
            :func:`wanda_lightning.allocation.allocate`.
        exact_error: Gather X^T X for every method, to report exact reconstruction errors; takes the time of SparseGPT.
        sum_over_ranks: Adds a tensor up over processes, where each holds a part of the calibration set.
        progress: Wraps the iteration over layers, given it and its length, to show how far it is.

    Returns:
        What was done to every linear.

    Raises:
        ValueError: If an argument, the model or the calibration set cannot be used; no weight has changed then, except
            if activations overflow in a later layer.

    Example:
        >>> report = prune_model(model, batches, Wanda(), Unstructured(0.5))  # doctest: +SKIP
        >>> report.sparsity  # doctest: +SKIP
        0.5
    """
    started = time.perf_counter()
    model = uncompiled(model)
    decoder = decoder_layers(model, targets, ignore, layers)
    patterns = allocate([linear for layer in decoder for linear in layer.linears], pattern, allocation)
    wanted = InputHessian if exact_error else method.statistic
    _check(model, decoder, method, {**patterns, "": pattern}, wanted is None or calibration is not None)
    report = PruningReport(str(method), str(pattern), pattern.sparsity)
    report.matches = count_matches(decoder, [*(targets or ()), *(ignore or ()), *(allocation or ())])
    for layer in decoder:
        report.not_pruned |= layer.left_dense
    with torch.inference_mode(False), torch.no_grad(), _left_as_found(model):
        visited = _statistics(model, decoder, calibration, wanted, sum_over_ranks)
        for layer, statistics in progress(visited, len(decoder)) if progress else visited:
            for linear in layer.linears:
                row = _prune_linear(layer, linear, statistics.get(linear.name), method, patterns[linear.name])
                report.linears.append(row)
    if method.statistic is not None and (unseen := sum(row.tokens == 0 for row in report.linears)):
        log.warning(
            "no calibration token reached %d of %d expert matrices: they were pruned by magnitude within each row. "
            "More calibration samples reach more experts.",
            unseen,
            sum(linear.experts is not None for layer in decoder for linear in layer.linears),
        )
    report.whole_model_sparsity = whole_model_sparsity(model)
    report.seconds = time.perf_counter() - started
    return report


def _statistics(
    model: nn.Module,
    layers: list[DecoderLayer],
    calibration: Iterable[Batch] | None,
    wanted: type[InputStatistic] | None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None,
) -> Iterator[tuple[DecoderLayer, Statistics]]:
    """Visit the layers with the statistics of their linears' inputs, if any are wanted."""
    if wanted is None or calibration is None:
        yield from ((layer, {}) for layer in layers)
        return
    for step in walk(model, layers, calibration):
        statistics = step.collect(wanted) if step.layer.linears else {}
        if sum_over_ranks is not None:
            for statistic in {id(s): s for s in statistics.values()}.values():
                statistic.reduce(sum_over_ranks)
        yield step.layer, statistics


def _prune_linear(
    layer: DecoderLayer,
    linear: PrunableLinear,
    statistic: InputStatistic | None,
    method: PruningMethod,
    pattern: Pattern,
) -> LinearReport:
    weight_OI = linear.weight_OI
    dense_OI = weight_OI.clone()
    started = time.perf_counter()
    tolerance = method.tolerance((weight_OI.shape[0], weight_OI.shape[1]))
    try:
        if method.statistic is not None and statistic is not None and statistic.tokens == 0:
            mask_OI = pattern.mask(weight_OI.float().abs())
            weight_OI.masked_fill_(~mask_OI, 0)
            tolerance = 1 / weight_OI.shape[1]
        else:
            mask_OI = method.prune(weight_OI, statistic, pattern)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{linear.name} cannot be pruned: {error}") from error
    seconds = time.perf_counter() - started
    pattern.check_mask(mask_OI, tolerance)
    assert not weight_OI[~mask_OI].any(), f"{linear.name} has weights where its mask has none"
    return LinearReport(
        name=linear.name,
        layer=layer.name,
        shape=(weight_OI.shape[0], weight_OI.shape[1]),
        sparsity=sparsity_of(weight_OI),
        seconds=seconds,
        tokens=statistic.tokens if statistic else None,
        error=_relative_error(dense_OI, weight_OI, statistic) if statistic and statistic.tokens else None,
        error_is_exact=isinstance(statistic, InputHessian),
        damping=statistic.damping if isinstance(statistic, InputHessian) else None,
    )


def _relative_error(dense_OI: Tensor, pruned_OI: Tensor, statistic: InputStatistic) -> float:
    """Compute ||(W - W') X||^2 / ||W X||^2 over the calibration set, from the statistic alone."""
    lost = statistic.output_energy(dense_OI - pruned_OI).sum()
    return float(lost / statistic.output_energy(dense_OI).sum().clamp_min(torch.finfo(lost.dtype).tiny))


def _check(
    model: nn.Module,
    layers: list[DecoderLayer],
    method: PruningMethod,
    patterns: dict[str, Pattern],
    calibrated: bool,
) -> None:
    """Refuse what cannot work before any weight has changed."""
    for pattern in set(patterns.values()):
        method.check(pattern)
    if not calibrated:
        raise ValueError(f"{method} needs calibration batches, got None")
    linears = [linear for layer in layers for linear in layer.linears]
    if not linears:
        raise ValueError("nothing is left to prune: targets and ignore exclude every linear of the decoder")
    if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{len(absent)} weights are not in memory ({absent[0]}, ...): they were offloaded, or never loaded. Load "
            "the model with a device_map that offloads nothing to the CPU or the disk"
        )
    for linear in linears:
        weight_OI = linear.weight_OI
        if not weight_OI.is_floating_point():
            raise ValueError(
                f"{linear.name} holds {weight_OI.dtype}, not floating-point weights: prune before quantising"
            )
        patterns[linear.name].check_in_features(weight_OI.shape[1], linear.name)
        if not torch.isfinite(weight_OI).all():
            raise ValueError(f"{linear.name} has NaN or infinite weights")


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
