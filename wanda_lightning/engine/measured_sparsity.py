"""What a model is pruned to, read back from its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from wanda_lightning.allocation.selection import Selection
from wanda_lightning.engine.shared_weights import repeats_in
from wanda_lightning.methods import PruningMethod
from wanda_lightning.model.decoder import every_linear
from wanda_lightning.model.linears import PrunableLinear, own_parameters
from wanda_lightning.model.names import name_without_adapters
from wanda_lightning.model.offload import is_offloaded
from wanda_lightning.report.linear_report import LinearReport, mean_sparsity
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Pattern, SemiStructured, max_kept_per_group, nonzeros, sparsity_of

Lists = str | Sequence[str] | None

NOTABLE = 0.05
"""Weights are zero by chance too: quantisation makes some. From this fraction on, somebody pruned them."""

FOUND = "already pruned, not by this run's "
"""What the method of a report begins with where the zeros were there before."""

SAMPLED = 64
"""Places of each matrix that are looked at to know its mask again; two masks agree there by chance once in 2^32."""


@torch.no_grad()
def report_as_found(
    model: nn.Module,
    method: PruningMethod,
    pattern: Pattern,
    selection: Selection,
) -> tuple[PruningReport, bool]:
    """Measure the linears that are to be pruned.

    Args:
        model: A causal language model of transformers, or another one with its lists of layers in the selection.
        method: What they are to be pruned with.
        pattern: What they are to be pruned to.
        selection: What is asked for of linears.

    Returns:
        A report of the linears as they are, which says in its ``method`` that they were pruned before, and whether
        every one of them has the zeros that the pattern asks for; all together where an allocator splits them. Matrices
        that are zero as a whole are so by design, such as the last ones of new blocks that change nothing yet: they
        tell nothing and are left out.
    """
    report = PruningReport(f"{FOUND}{method}", str(pattern), pattern.sparsity)
    decoder, patterns = selection.choose(model, pattern)
    repeats = repeats_in(decoder)
    again = {repeat.name for repeat in repeats}
    met = any(own.sparsity > 0 for own in patterns.values())
    for layer in decoder:
        report.not_pruned |= layer.left_dense
        for linear in (linear for linear in layer.linears if linear.name not in again):
            weight_OI = linear.weight_OI
            if weight_OI.is_meta:  # pruning will refuse it
                return report, False
            shape = (weight_OI.shape[0], weight_OI.shape[1])
            if (sparsity := sparsity_of(weight_OI)) == 1:
                continue
            report.linears.append(LinearReport(linear.name, layer.name, shape, sparsity, 0.0))
            if selection.allocator is None:
                met = met and _has_zeros_of(weight_OI, patterns[linear.name], method.tolerance(shape))
    report.repeat(repeats)
    if selection.allocator is not None:  # how it would split them nobody knows yet
        met = met and report.sparsity >= pattern.sparsity - _rounding(report.linears, method)
    return report, met and bool(report.linears)


def _rounding(rows: Sequence[LinearReport], method: PruningMethod) -> float:
    """How much less than asked for an allocator may have given: half a weight in each row of a linear, in all.

    Methods that compare within other groups than rows round once more.
    """
    weights = sum(row.shape[0] * row.shape[1] for row in rows)
    further = (method.tolerance(row.shape) for row in rows if method.tolerance(row.shape) * row.shape[1] < 1)
    return max((row.shape[0] / 2 for row in rows), default=0) / max(1, weights) + max(further, default=0.0)


def sparsity_now(model: nn.Module, reports: Sequence[tuple[PruningReport, Lists]]) -> float:
    """Measure the fraction of zeros in the linears that reports, each of its lists, say were pruned; 0 without one."""
    repeated = {row.name for report, _ in reports for row in report.linears if row.same_as}
    linears = [linear for report, layers in reports for linear in linears_of(model, report, layers)]
    weights = [linear.weight_OI for linear in linears if name_without_adapters(linear.name) not in repeated]
    if any(weight.is_meta for weight in weights):  # on disk, where nothing has changed them since
        return mean_sparsity([row for report, _ in reports for row in report.linears])
    zeros = sum(sparsity_of(weight) * weight.numel() for weight in weights)
    return zeros / max(1, sum(weight.numel() for weight in weights))


def linears_of(model: nn.Module, report: PruningReport, layers: Lists = None) -> list[PrunableLinear]:
    """Find the linears of a model that a report has rows of."""
    pruned = {row.name for row in report.linears}
    return [linear for linear in every_linear(model, layers) if name_without_adapters(linear.name) in pruned]


def read_back(model: nn.Module, report: PruningReport, layers: Lists = None) -> list[LinearReport]:
    """Return the rows of a report with the sparsities that the linears have now."""
    now = {name_without_adapters(linear.name): linear.weight_OI for linear in linears_of(model, report, layers)}
    return [replace(row, sparsity=sparsity_of(now[row.name])) for row in report.linears]


@torch.no_grad()
def linears_with_zeros(model: nn.Module, layers: Lists = None) -> list[PrunableLinear]:
    """Find the linears of a model's decoder that have more zeros than there are by chance."""
    linears = every_linear(model, layers)
    return [linear for linear in linears if linear.weight_OI.is_meta or sparsity_of(linear.weight_OI) >= NOTABLE]


@torch.no_grad()
def disagreements(model: nn.Module, report: PruningReport, layers: Lists = None) -> dict[str, str]:
    """Compare a report with the weights that the layers compute with.

    Zeros that training adds by chance do not count, and neither do matrices that were zero as a whole when they were
    pruned: the half of them that was not pruned has been trained since.

    Args:
        model: The model that the report is of.
        report: What was pruned.
        layers: Name of the list of decoder layers, where the rule for finding it fails; or names of several lists.

    Returns:
        For each linear that has other zeros than its row says: its name and what is wrong.
    """
    found = {name_without_adapters(linear.name): linear.weight_OI for linear in linears_of(model, report, layers)}
    wrong = {row.name: "the model has no such linear" for row in report.linears if row.name not in found}
    for row in report.linears:
        weight_OI = found.get(row.name)
        if weight_OI is None or weight_OI.is_meta:  # what is on disk has not changed since
            continue
        if tuple(weight_OI.shape) != tuple(row.shape):
            wrong[row.name] = f"its shape is {tuple(weight_OI.shape)}, the report says {tuple(row.shape)}"
        elif row.sparsity < 1:
            now = sparsity_of(weight_OI)
            if now < row.sparsity - 0.5 / weight_OI.numel() or now > row.sparsity + NOTABLE:
                wrong[row.name] = f"{now:.2%} of its weights are zero, the report says {row.sparsity:.2%}"
    return wrong


@torch.no_grad()
def sample_zeros(linears: Sequence[PrunableLinear]) -> dict[str, Tensor]:
    """Note for some places of each matrix whether it is zero there: enough to know its mask again.

    Args:
        linears: Matrices, pruned just now.

    Returns:
        By name, without adapters, booleans of shape (``SAMPLED``,). Matrices that are on disk, or zero as a whole, are
        left out.
    """
    return {
        name_without_adapters(linear.name): zeros
        for linear in linears
        if not linear.weight_OI.is_meta and not (zeros := _sampled(linear.weight_OI) == 0).all()
    }


@torch.no_grad()
def has_zeros_at(linears: Sequence[PrunableLinear], sampled: Mapping[str, Tensor]) -> bool:
    """Whether matrices are zero where :func:`sample_zeros` found a zero; those that it left out may be anything."""
    weights = {name_without_adapters(linear.name): linear.weight_OI for linear in linears}
    return all(
        not bool(_sampled(weights[name])[zeros.to(weights[name].device)].any())
        for name, zeros in sampled.items()
        if name in weights and not weights[name].is_meta
    )


def _sampled(weight_OI: Tensor) -> Tensor:
    """Pick values that are spread over rows and columns."""
    place = torch.arange(SAMPLED, device=weight_OI.device)
    rows, columns = weight_OI.shape
    return weight_OI[(place * 7919) % rows, (place * 104729 + place // 3) % columns]


def _has_zeros_of(weight_OI: Tensor, pattern: Pattern, tolerance: float) -> bool:
    if not isinstance(pattern, SemiStructured):
        return sparsity_of(weight_OI) >= pattern.sparsity - tolerance
    return weight_OI.shape[1] % pattern.m == 0 and max_kept_per_group(weight_OI != 0, pattern.m) <= pattern.n


def measure_whole_model(model: nn.Module) -> float:
    """Measure the fraction of zeros over all parameters, see :class:`ZeroCount`."""
    return ZeroCount(model).sparsity


class ZeroCount:
    """Counts the zeros of a model, also of layers that are in memory one at a time; those of adapters do not count.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._total = sum(parameter.numel() for parameter in own_parameters(model))
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
    return sum(nonzeros(parameter) for parameter in own_parameters(module) if not parameter.is_meta)
