"""A header and rows of text as a table, for Markdown and for the terminal."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from wanda_lightning.report.fitting_table import FittingTable

Table = tuple[list[str], list[list[str]]]
"""A header, and rows of text."""
MARKS = re.compile(r"[\\`*\[<|$]|~(?!\d)|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown takes for something else than text; an underscore within a word, and ~ before a number, are none."""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return the lines of a Markdown table; the columns that ``left`` numbers are text, the others figures."""
    rule = ["---" if number in left else "---:" for number in range(len(header))]
    escaped = [[MARKS.sub(r"\\\g<0>", cell) for cell in row] for row in (header, *rows)]
    return ["| " + " | ".join(row) + " |" for row in (escaped[0], rule, *escaped[1:])]


def terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> FittingTable:
    """Return a table for a rich console."""
    return FittingTable(header, rows, left)


def in_bytes(size: float) -> str:
    """Write a number of bytes with a unit that suits it."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def with_errors(metrics: dict[str, float]) -> dict[str, str]:
    """Write metrics for a table: one that comes with a standard error, ``<name>_stderr``, as ``0.41 ± 0.02``.

    Whole numbers, as counts are, keep all their digits.
    """
    errors = {name: f" ± {metrics[f'{name}_stderr']:.2g}" for name in metrics if f"{name}_stderr" in metrics}
    return {
        name: f"{value:{',.0f' if float(value).is_integer() else '.4g'}}" + errors.get(name, "")
        for name, value in metrics.items()
        if name.removesuffix("_stderr") not in errors or name in errors
    }


def evaluation_table(evaluations: Mapping[str, dict[str, float]]) -> Table | None:
    """Return metrics by stage; None if the model was not evaluated."""
    if not evaluations:
        return None
    values = {stage: with_errors(metrics) for stage, metrics in evaluations.items()}
    metrics = dict.fromkeys(metric for stage in values.values() for metric in stage)
    return ["evaluation", *values], [[m, *(stage.get(m, "") for stage in values.values())] for m in metrics]
