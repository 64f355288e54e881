"""What a model has been pruned to before, such as one loaded from a folder that pruning wrote."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wanda_lightning.allocation.by_name import Allocation, allocate
from wanda_lightning.methods import PruningMethod
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.names import name_without_adapters
from wanda_lightning.model.offload import is_offloaded
from wanda_lightning.report.linear_report import LinearReport
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Pattern, SemiStructured, sparsity_of

NOTABLE = 0.05
"""Weights are zero by chance too: quantisation makes some. From this fraction on, somebody pruned them."""


@torch.no_grad()
def report_as_found(
    model: nn.Module,
    method: PruningMethod,
    pattern: Pattern,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    layers: str | None = None,
    allocation: Allocation | None = None,
) -> tuple[PruningReport, bool]:
    """Measure the linears that are to be pruned.

    Args:
        model: A causal language model of transformers.
        method: What they are to be pruned with.
        pattern: What they are to be pruned to.
        targets: As of :func:`wanda_lightning.prune_model`.
        ignore: As of :func:`wanda_lightning.prune_model`.
        layers: As of :func:`wanda_lightning.prune_model`.
        allocation: As of :func:`wanda_lightning.prune_model`.

    Returns:
        A report of the linears as they are, which says in its ``method`` that they were pruned before, and whether
        every one of them has the zeros that the pattern asks for.
    """
    report = PruningReport(f"already pruned, not by this run's {method}", str(pattern), pattern.sparsity)
    decoder = decoder_layers(model, targets, ignore, layers)
    patterns = allocate([linear for layer in decoder for linear in layer.linears], pattern, allocation)
    met = any(own.sparsity > 0 for own in patterns.values())
    for layer in decoder:
        report.not_pruned |= layer.left_dense
        for linear in layer.linears:
            weight_OI = linear.weight_OI
            if weight_OI.is_meta:  # pruning will refuse it
                return report, False
            shape = (weight_OI.shape[0], weight_OI.shape[1])
            report.linears.append(LinearReport(linear.name, layer.name, shape, sparsity_of(weight_OI), 0.0))
            met = met and _has_zeros_of(weight_OI, patterns[linear.name], method.tolerance(shape))
    report.whole_model_sparsity = measure_whole_model(model)
    return report, met and bool(report.linears)


def sparsity_now(model: nn.Module, report: PruningReport | None, layers: str | None = None) -> float:
    """Measure the fraction of zeros in the linears that a report says were pruned; 0 without a report."""
    if report is None:
        return 0.0
    pruned = {row.name for row in report.linears}
    decoder = decoder_layers(model, targets=["*"], layers=layers)
    weights = [
        linear.weight_OI
        for layer in decoder
        for linear in layer.linears
        if name_without_adapters(linear.name) in pruned
    ]
    if any(weight.is_meta for weight in weights):  # on disk, where nothing has changed them since
        return report.sparsity
    zeros = sum(sparsity_of(weight) * weight.numel() for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def _has_zeros_of(weight_OI: Tensor, pattern: Pattern, tolerance: float) -> bool:
    if not isinstance(pattern, SemiStructured):
        return sparsity_of(weight_OI) >= pattern.sparsity - tolerance
    if weight_OI.shape[1] % pattern.m:
        return False
    return bool(((weight_OI != 0).reshape(-1, pattern.m).sum(-1) <= pattern.n).all())


def measure_whole_model(model: nn.Module) -> float:
    """Measure the fraction of zeros over all parameters; shared ones count once."""
    return ZeroCount(model).sparsity


class ZeroCount:
    """Counts the zeros of a model, also of layers that are in memory one at a time.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._total = sum(parameter.numel() for parameter in model.parameters())
        self._is_offloaded = is_offloaded(model)
        self._kept_elsewhere = 0

    def visit(self, layer: nn.Module) -> None:
        """Count the weights of a layer, if they are in memory for a while only."""
        if self._is_offloaded:
            self._kept_elsewhere += _count_kept(layer)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all parameters; shared ones count once."""
        return 1 - (_count_kept(self._model) + self._kept_elsewhere) / max(1, self._total)


def _count_kept(module: nn.Module) -> int:
    """Count the weights in memory that are not zero."""
    return sum(int(torch.count_nonzero(p)) for p in module.parameters() if not p.is_meta)
