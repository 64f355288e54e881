"""A pruning report as one HTML file that needs no network: tables, a heat map and a line over the layers."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanda_lightning.report import LinearReport, PruningReport

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #667; --paper: #fff; --line: #d8dce2; --heat: 200, 60, 30;
        --curve: #2563a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #9aa3ad; --paper: #14171a; --line: #363c44; --heat: 235, 110, 70; --curve: #79b0ea; }
}
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
       font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin-top: 2rem; }
p.note { color: var(--faint); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { white-space: normal; vertical-align: bottom; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
svg { width: 100%; max-width: 44rem; height: auto; }
@media (max-width: 40rem) { body { padding: .6rem; } th, td { padding: .2rem .3rem; font-size: 12px; } }
 svg text { fill: var(--faint); font-size: 11px; }
"""


def to_html(report: "PruningReport") -> str:
    """Write a report as a page.

    Args:
        report: What a pruning did.

    Returns:
        The page, self-contained.
    """
    heading = escape(report.title)
    body = [f"<h1>{heading}</h1>", f"<p>{escape(report.summary)}</p>"]
    for header, rows in report.overview():
        body += [_table(header, rows)]
    body += _heat_map(report)
    body += [_heading("settings"), _table(None, _settings(report))]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _heading(text: str) -> str:
    return f"<h2>{escape(text[:1].upper() + text[1:])}</h2>"


def _table(header: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> str:
    head = "" if header is None else "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"
    kind = ' class="text"' if header is None else ""
    body = "".join("<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _settings(report: "PruningReport") -> list[list[str]]:
    solving = sum(row.seconds for row in report.linears)
    return [
        ["seconds to choose masks and update weights", f"{solving:.1f}"],
        ["seconds for all else, mostly forward passes", f"{max(0.0, report.seconds - solving):.1f}"],
        *([key, str(value)] for key, value in {**report.calibration, **report.environment}.items()),
    ]


def _heat_map(report: "PruningReport") -> list[str]:
    """Show error and sparsity of every linear: a row for each layer, a column for each kind, darker is more error."""
    cells: dict[str, dict[str, list[LinearReport]]] = {}
    for row in report.linears:
        cells.setdefault(row.layer, {}).setdefault(_kind(row), []).append(row)
    kinds = list(dict.fromkeys(kind for layer in cells.values() for kind in layer))
    errors = [row.error for row in report.linears if row.error is not None]
    if not errors:
        return []
    exact = all(row.error_is_exact for row in report.linears if row.error is not None)
    head = "".join(f"<th>{escape(kind).replace('.', '.<wbr>').replace('_', '_<wbr>')}</th>" for kind in kinds)
    body = ""
    for layer, by_kind in cells.items():
        shown = "".join(_cell(by_kind.get(kind, []), max(errors)) for kind in kinds)
        body += f"<tr><td>{escape(layer.rpartition('.')[2])}</td>{shown}</tr>\n"
    note = "||(W - W') X||² / ||W X||² on the calibration set" + (
        "" if exact else ", estimated from the diagonal of XᵀX where marked ~"
    )
    means = [_mean([row for rows in layer.values() for row in rows]) for layer in cells.values()]
    return [
        _heading("reconstruction error by layer"),
        f'<p class="note">{escape(note)}. Point at a cell for its sparsity.</p>',
        _curve([mean for mean in means if mean is not None]),
        f'<div class="wide"><table><tr><th>layer</th>{head}</tr>{body}</table></div>',
    ]


def _kind(row: "LinearReport") -> str:
    """Name a linear within its layer; the experts of a mixture are one kind."""
    name = row.name.removeprefix(f"{row.layer}.")
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _mean(rows: Sequence["LinearReport"]) -> float | None:
    errors = [row.error for row in rows if row.error is not None]
    return sum(errors) / len(errors) if errors else None


def _cell(rows: Sequence["LinearReport"], most: float) -> str:
    mean = _mean(rows)
    if mean is None:
        return "<td></td>"
    sparsity = sum(row.sparsity for row in rows) / len(rows)
    approximate = "" if all(row.error_is_exact for row in rows) else "~"
    color = f"background: rgba(var(--heat), {0.75 * (mean / most if most else 0) ** 0.5:.3f})"
    return f'<td style="{color}" title="sparsity {sparsity:.2%}">{approximate}{mean:.4f}</td>'


def _curve(means: Sequence[float], width: int = 600, height: int = 140, margin: int = 34) -> str:
    """Draw the mean error over the layers."""
    most = max(means) or 1.0
    step = (width - 2 * margin) / max(1, len(means) - 1)
    points = [
        (margin + n * step, height - margin - (height - 2 * margin) * mean / most) for n, mean in enumerate(means)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="var(--curve)"/>' for x, y in points)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="mean error by layer">'
        f'<path d="M{margin} {height - margin}H{width - margin}" stroke="var(--line)"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--curve)" stroke-width="1.5"/>{dots}'
        f'<text x="2" y="{margin - 12}">{most:.3g}, mean of the layer</text><text x="2" y="{height - margin}">0</text>'
        f'<text x="{margin}" y="{height - 12}">first layer</text>'
        f'<text x="{width - margin}" y="{height - 12}" text-anchor="end">last layer</text></svg>'
    )
