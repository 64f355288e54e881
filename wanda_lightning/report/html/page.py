"""A pruning report as one HTML file that needs no network and no scripts."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from wanda_lightning.model.names import kind_of
from wanda_lightning.report.by_layer import by_kind, layers, number, stem_of
from wanda_lightning.report.html.charts import bars, breakable, heat_map, histograms, lines
from wanda_lightning.report.linear_report import mean_error, mean_sparsity
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
    heading = escape(report.title)
    style = files("wanda_lightning.report.html").joinpath("style.css").read_text(encoding="utf-8")
    body = [f"<h1>{breakable(report.title)}</h1>", f"<p>{escape(report.summary).replace(' s.', '&nbsp;s.')}</p>"]
    if report.model:
        body.insert(1, f"<p>Model: {escape(report.model_name)}.</p>")
    for part in (_evaluations, _errors, _sparsities, _magnitudes, _costs, _not_pruned, _settings):
        body += part(report)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _evaluations(report: "PruningReport") -> Iterable[str]:
    if not report.evaluations:
        yield _note("The model was not evaluated in this run.")
        return
    header, rows = next(iter(report.overview()))
    yield _table([header[0], *header[1:]], rows)


def _errors(report: "PruningReport") -> Iterable[str]:
    yield _heading("Reconstruction error")
    rows = [row for row in report.linears if row.error is not None]
    if not rows:
        yield _note("Not measured: without calibration data there are no outputs to compare.")
        return
    exact = all(row.error_is_exact for row in rows)
    yield (
        '<p class="note">How much of a linear\'s output the pruning changed: <span class="formula">||(W - W\') X||² / '
        "||W X||²</span> on the calibration set"
        + ("." if exact else ", estimated from the diagonal of XᵀX (~).")
        + (" Of the experts of a layer the mean is shown." if _has_experts(report) else "")
        + "</p>"
    )
    unseen = sum(row.tokens == 0 for row in report.linears)
    if unseen:
        yield _note(f"No calibration token reached {unseen} matrices: they were pruned by magnitude within each row.")
    series = by_kind(report, mean_error)
    top = max(value for values in series.values() for value in values if value is not None)
    mark = "" if exact else "~"
    yield from _by_layer(
        report, series, top, lambda value: f"{mark}{value:.4f}", lambda value: f"{value:.3g}", "error", True
    )


def _sparsities(report: "PruningReport") -> Iterable[str]:
    if not report.linears:
        return
    yield _heading("Sparsity")
    least, most = (choose(row.sparsity for row in report.linears) for choose in (min, max))
    alike = most - least < 0.005
    yield _note(
        f"Every pruned linear has {' to '.join(dict.fromkeys(map(_percent, (least, most))))} zeros."
        if alike
        else f"The pruned linears have from {_percent(least)} to {_percent(most)} zeros. Empty cells were not pruned."
    )
    series = by_kind(report, mean_sparsity)
    yield from _by_layer(report, series, 1.0, _percent, lambda value: f"{value:.0%}", "sparsity", not alike)


def _magnitudes(report: "PruningReport") -> Iterable[str]:
    shown = histograms(report.magnitudes)
    if not shown:
        return
    yield _heading("Kept and pruned weights")
    yield (
        '<p class="note"><span class="box" style="background: var(--c0)"></span>kept'
        '<span class="box" style="background: var(--c1)"></span>pruned, by |w| before the pruning (logarithmic axis), '
        "as a share of the weights. Methods that look at the inputs keep some small weights and prune some larger "
        "ones. Of large matrices evenly spaced rows are counted.</p>"
    )
    counts = report.magnitudes.values()
    zeros = sum(m.kept.get(ZERO, 0) + m.pruned.get(ZERO, 0) for m in counts)
    if zeros:
        total = sum(sum(m.kept.values()) + sum(m.pruned.values()) for m in counts)
        yield _note(f"{zeros / total:.2%} of the weights were zero already; they have no bar.")
    yield shown


def _costs(report: "PruningReport") -> Iterable[str]:
    yield _heading("Time and memory")
    if report.seconds_by_phase:
        yield bars(report.costs(), lambda seconds: f"{seconds:.2f} s ({seconds / max(report.seconds, 1e-9):.0%})")
    else:
        yield _note(f"{report.seconds:.1f} s in all.")
    if report.memory:
        yield bars(report.memory, in_bytes)
        yield _note("Peaks since the process started.")
    seconds: dict[str, float] = {}
    for row in report.linears:
        seconds[row.kind] = seconds.get(row.kind, 0.0) + row.seconds
    if any(seconds.values()):
        yield "<h3>Choosing masks and updating weights, by kind of linear</h3>"
        yield bars(seconds, lambda value: f"{value:.2f} s")


def _not_pruned(report: "PruningReport") -> Iterable[str]:
    yield _heading("What was not pruned")
    yield _note("Embeddings, norms and the output head are never pruned. Of the decoder layers:")
    if report.not_pruned:
        stem = stem_of(report)
        kinds = Counter((reason, kind_of(name, stem)) for name, reason in report.not_pruned.items())
        yield _table(
            ["matrices", "because", "how many"],
            [[kind.removeprefix("*."), reason, str(count)] for (reason, kind), count in kinds.items()],
            "words",
        )
    else:
        yield _note("Every linear was pruned.")
    if report.matches:
        yield "<h3>Name patterns</h3>"
        yield _table(["pattern", "linears"], [[pattern, str(count)] for pattern, count in report.matches.items()])


def _settings(report: "PruningReport") -> Iterable[str]:
    yield _heading("Settings")
    settings = {
        "method": report.method,
        "pattern": report.pattern,
        "target sparsity": f"{report.target_sparsity:g}",
        **report.calibration,
        **report.environment,
    }
    yield _table(None, [[key.replace("_", " "), str(value)] for key, value in settings.items()])


def _by_layer(
    report: "PruningReport",
    series: Mapping[str, "Values"],
    top: float,
    show: Callable[[float], str],
    level: Callable[[float], str],
    color: str,
    curves: bool,
) -> Iterable[str]:
    """Show values by layer and kind: as a map, as lines, and as a table that opens on demand."""
    stem = stem_of(report)
    labels = [number(layer, stem) for layer in layers(report)]
    yield heat_map(series, labels, top, show, level, color)
    if curves and len(labels) > 1:
        yield lines(series, labels, level)
    rows = [
        [label, *("" if value is None else show(value) for value in values)]
        for label, *values in zip(labels, *series.values(), strict=True)
    ]
    yield f"<details><summary>All figures</summary>{_table(['layer', *series], rows, 'figures')}</details>"


def _has_experts(report: "PruningReport") -> bool:
    return len({(row.layer, row.kind) for row in report.linears}) < len(report.linears)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(header: Sequence[str] | None, rows: Iterable[Sequence[str]], kind: str = "") -> str:
    kind = kind or ("text" if header is None else "")
    head = "" if header is None else "<tr>" + "".join(f"<th>{breakable(cell)}</th>" for cell in header) + "</tr>"
    body = "".join(
        "<tr>"
        + "".join(f"<td>{breakable(cell) if not n else escape(cell)}</td>" for n, cell in enumerate(row))
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}">{head}{body}</table></div>'
