"""Perplexity against seconds, drawn from the tables that benchmarks/quality.py prints; a panel for each pattern.

    python benchmarks/quality_picture.py TABLE.md [TABLE.md ...] PICTURE.png

A table has the columns method, pattern, perplexity and seconds, as printed: ``12.34``, or ``12.34 ± 0.56`` with error
bars then. Where there are others, such as the number of passes, or accuracies, they are not looked at. The line of the
dense model is a level. Needs matplotlib.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wanda_lightning.atomic_files import whole_file
from wanda_lightning.runs.plotting import check, log_scale_if_wide

MARKERS = "osD^vPX*<>"


class Measured(NamedTuple):
    """A mean, and its standard deviation; 0 of a single run."""

    mean: float
    spread: float = 0.0

    @classmethod
    def of(cls, cell: str) -> "Measured":
        return cls(*map(float, cell.replace(",", "").replace("±", " ").split()))


class Row(NamedTuple):
    method: str
    pattern: str
    perplexity: Measured
    seconds: Measured | None


def rows_of(text: str) -> Iterator[Row]:
    """Read the tables of a text that have these columns."""
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip().strip("*`") for cell in line.strip().strip("|").split("|")]
        if not line.strip().startswith("|"):
            columns = []
            continue
        if re.fullmatch(r"[\s|:-]+", line):
            continue
        if {"method", "pattern", "perplexity", "seconds"} <= {*cells}:
            columns = cells
        elif columns and len(cells) == len(columns):
            row = dict(zip(columns, cells, strict=True))
            seconds = Measured.of(row["seconds"]) if row["seconds"] else None
            yield Row(row["method"], row["pattern"], Measured.of(row["perplexity"]), seconds)


def title(pattern: str) -> str:
    return pattern if ":" in pattern or "%" in pattern else f"{100 * float(pattern):g} %"


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw a panel for each pattern; a method has the same colour and marker in all of them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    dense = next((row.perplexity.mean for row in rows if row.seconds is None and not row.pattern), None)
    pruned = [row for row in rows if row.seconds is not None]
    patterns, methods = ([*dict.fromkeys(getattr(row, name) for row in pruned)] for name in ("pattern", "method"))
    figure = Figure(figsize=(1.2 + 3.4 * len(patterns), 4.6), dpi=150, layout="constrained")
    panels: Any = figure.subplots(1, len(patterns), squeeze=False)[0]
    for axes, pattern in zip(panels, patterns, strict=True):
        shown = [row for row in pruned if row.pattern == pattern]
        for row in shown:
            number = methods.index(row.method)
            axes.errorbar(
                row.seconds.mean, row.perplexity.mean, row.perplexity.spread or None, row.seconds.spread or None,
                color=f"C{number % 10}", marker=MARKERS[number % len(MARKERS)], markersize=5, capsize=3,
                linestyle="none", label=row.method,
            )  # fmt: skip
        levels = [row.perplexity.mean for row in shown]
        if dense is not None:
            axes.axhline(dense, color="0.5", linestyle=":", label="dense")
            levels.append(dense)
        log_scale_if_wide(axes, levels)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title(pattern))
        axes.set_xlabel("seconds")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity (less is better)")
    named = {label: mark for axes in panels for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=min(3, len(named)), fontsize="small")
    with whole_file(file) as unfinished:
        figure.savefig(unfinished)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("picture")
    options = parser.parse_args()
    picture = check(options.picture)
    rows = [row for table in options.tables for row in rows_of(table.read_text(encoding="utf-8"))]
    if not any(row.seconds for row in rows):
        parser.error(f"no table with method, pattern, perplexity and seconds in {', '.join(map(str, options.tables))}")
    draw(rows, picture)


if __name__ == "__main__":
    main()
