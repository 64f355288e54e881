"""A pruning report as one HTML file that needs no network and no scripts; ``page.html`` is its template."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wanda_lightning.model.names import kind_of, list_of
from wanda_lightning.report.by_layer import by_kind, labels, layers
from wanda_lightning.report.html.charts import bars, heat_map, histograms, lines
from wanda_lightning.report.html.templates import render
from wanda_lightning.report.layer_reconstruction import reconstruction_table
from wanda_lightning.report.linear_report import mean_error, mean_sparsity
from wanda_lightning.report.loss_curve import averaged
from wanda_lightning.report.samples import prompts_of
from wanda_lightning.report.tables import in_bytes
from wanda_lightning.report.weight_magnitudes import ZERO

if TYPE_CHECKING:
    from wanda_lightning.report.by_layer import Values
    from wanda_lightning.report.pruning_report import PruningReport


def to_html(report: "PruningReport") -> str:
    """Write a report as a page.

    Args:
        report: What a pruning did.

    Returns:
        The page, self-contained.
    """
    return render(
        "page.html",
        report=report,
        evaluation=report.evaluation_table(),
        prompts=prompts_of(report.samples),
        training=_training(report),
        errors=_errors(report),
        reconstruction=_reconstruction(report),
        sparsities=_sparsities(report),
        allocation=_allocation(report),
        magnitudes=_magnitudes(report),
        costs=_costs(report),
        not_pruned=_not_pruned(report),
        settings=_settings(report),
    )


def _errors(report: "PruningReport") -> dict[str, Any] | None:
    rows = [row for row in report.linears if row.error is not None]
    if not rows:
        return None
    exact = all(row.error_is_exact for row in rows)
    series = by_kind(report, mean_error)
    top = max(value for values in series.values() for value in values if value is not None)
    mark = "" if exact else "~"
    return {
        "exact": exact,
        "experts": len({(row.layer, row.kind) for row in report.linears}) < len(report.linears),
        "unseen": sum(row.tokens == 0 for row in report.linears),
        "figures": _by_layer(report, series, top, lambda value: f"{mark}{value:.4f}", "{:.3g}".format, "error"),
    }


def _training(report: "PruningReport") -> dict[str, Any] | None:
    """Draw the loss, from a round number below its least value up."""
    points = [(step, loss) for step, loss in averaged(report.training, 40) if math.isfinite(loss)]
    if len(points) < 2:
        return None
    losses = [loss for _, loss in points]
    spread = max(losses) - min(losses) or 1.0
    unit = 10.0 ** math.floor(math.log10(spread))
    low = math.floor(min(losses) / unit) * unit
    curve = lines({"loss": losses}, [str(step) for step, _ in points], "{:.4g}".format, low)
    return {"curve": curve, "steps": report.training[-1][0], "averaged": len(points) < len(report.training)}


def _reconstruction(report: "PruningReport") -> dict[str, Any] | None:
    """Draw the errors of the layers before and after their training."""
    if not report.reconstruction:
        return None
    trained = [report.reconstruction.get(layer) for layer in layers(report)]
    series = {
        "pruned": [None if layer is None else layer.before for layer in trained],
        "and trained": [None if layer is None else layer.after for layer in trained],
    }
    header, rows = reconstruction_table(report.reconstruction)
    return {"lines": lines(series, labels(report), "{:.3g}".format), "header": header, "rows": rows}


def _sparsities(report: "PruningReport") -> dict[str, Any] | None:
    if not report.linears:
        return None
    least, most = (choose(row.sparsity for row in report.linears) for choose in (min, max))
    alike = most - least < 0.005
    series = by_kind(report, mean_sparsity)
    empty = any(value is None for values in series.values() for value in values)
    figures = _by_layer(report, series, 1.0, _percent, "{:.0%}".format, "sparsity", not alike)
    return {"alike": alike, "empty": empty, "range": [_percent(least), _percent(most)], "figures": figures}


def _allocation(report: "PruningReport") -> dict[str, Any] | None:
    """Draw the figures that decided how the sparsity was split."""
    if report.allocation is None:
        return None
    series = by_kind(report, report.allocation.reason)
    values = [value for each in series.values() for value in each if value is not None]
    if not values:
        return {"figures": None}
    show = "{:.3g}".format
    return {"figures": _by_layer(report, series, max(0.0, *values), show, show, "error", min(values) >= 0)}


def _magnitudes(report: "PruningReport") -> dict[str, Any] | None:
    shown = histograms(report.magnitudes)
    if not shown:
        return None
    counts = report.magnitudes.values()
    zeros = sum(m.kept.get(ZERO, 0) + m.pruned.get(ZERO, 0) for m in counts)
    total = sum(sum(m.kept.values()) + sum(m.pruned.values()) for m in counts)
    return {"zeros": f"{zeros / total:.2%}" if zeros else "", "histograms": shown}


def _costs(report: "PruningReport") -> dict[str, Any]:
    whole = max(report.seconds, 1e-9)
    seconds: dict[str, float] = {}
    for row in report.linears:
        seconds[row.kind] = seconds.get(row.kind, 0.0) + row.seconds
    return {
        "phases": bars(report.costs(), lambda value: f"{value:.2f} s ({value / whole:.0%})"),
        "memory": bars(report.memory, in_bytes),
        "kinds": bars(seconds, "{:.2f} s".format) if any(seconds.values()) else "",
    }


def _not_pruned(report: "PruningReport") -> list[list[str]]:
    stem = list_of(report.linears[0].layer) if report.linears else ""
    kinds = Counter((reason, kind_of(name, stem)) for name, reason in report.not_pruned.items())
    return [[kind.removeprefix("*."), reason, str(count)] for (reason, kind), count in kinds.items()]


def _settings(report: "PruningReport") -> dict[str, Any]:
    return {
        "method": report.method,
        "pattern": report.pattern,
        "target sparsity": f"{report.target_sparsity:g}",
        **({"order": report.order} if report.order else {}),
        **report.calibration,
        **report.environment,
    }


def _by_layer(
    report: "PruningReport",
    series: Mapping[str, "Values"],
    top: float,
    show: Callable[[float], str],
    level: Callable[[float], str],
    color: str,
    curves: bool = True,
) -> dict[str, Any]:
    """Show values by layer and kind: as a map, as lines, and as a table that opens on demand."""
    names = labels(report)
    return {
        "map": heat_map(series, names, top, show, level, color),
        "lines": lines(series, names, level) if curves and len(names) > 1 else "",
        "header": ["layer", *series],
        "rows": [
            [name, *("" if value is None else show(value) for value in values)]
            for name, *values in zip(names, *series.values(), strict=True)
        ],
    }


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
