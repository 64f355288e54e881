"""A picture of a comparison: a metric against sparsity, one line for each method (matplotlib, the extra ``[plot]``)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanda_lightning.atomic_files import whole_file
from wanda_lightning.runs.budget import whole_name
from wanda_lightning.runs.comparison import Comparison

SUFFIXES = (".png", ".svg")
LEVELS = (":", "-.", "--")  # of dense models
LONG = 50  # characters of a name, half of the picture
Point = tuple[float, float]


def check(file: str | Path) -> Path:
    """Make sure that a picture can be drawn to a file, before any work is done for it.

    Args:
        file: Where the picture is to go.

    Returns:
        The file.

    Raises:
        ValueError: If the file is neither PNG nor SVG, or matplotlib is not installed.
    """
    path = Path(file)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"a picture must be one of {', '.join(SUFFIXES)}, got {str(file)!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f'drawing needs matplotlib: pip install "wanda-lightning[plot]" ({error})') from error
    return path


@contextmanager
def picture(file: str | Path, size: tuple[float, float]) -> Iterator[Any]:
    """Draw a picture.

    Args:
        file: Where it goes; see :func:`check`, which raises what is wrong with it.
        size: Width and height in inches.

    Yields:
        The figure of matplotlib to draw on; at the end it is saved.
    """
    path = check(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    yield figure
    with whole_file(path) as unfinished:
        figure.savefig(unfinished)


def metric_of(comparison: Comparison, metric: str | None) -> str:
    """Find the metric to draw.

    Args:
        comparison: The runs.
        metric: Its name, or the end of it, as in the table. Default: the first perplexity, else the first.

    Returns:
        Its name.

    Raises:
        ValueError: If no run has it, or several end so.
    """
    names = list(dict.fromkeys(name for row in comparison.rows() for name in row["metrics"]))
    if metric is None:
        metric = next((name for name in names if "perplexity" in name), next(iter(names), "perplexity"))
    return whole_name(metric, names, f"no run has the metric {metric!r}", "they have")


def plot(comparison: Comparison, file: str | Path, metric: str | None = None) -> None:
    """Draw a metric of several runs against their sparsity, one line for each method.

    Every point is at the sparsity that was reached. N:M patterns are squares; fine-tuned models have hollow markers and
    dashed lines; dense models are levels. Runs of other models or with other data are other lines, and named. Values
    that are NaN or infinite are counted beside the axis.

    Args:
        comparison: The runs.
        file: Where the picture goes; its suffix, .png or .svg, says what it is.
        metric: See :func:`metric_of`.

    Raises:
        ValueError: If no run has that metric, the file is neither PNG nor SVG, or matplotlib is not installed.
    """
    metric = metric_of(comparison, metric)
    found = [row for row in comparison.rows() if metric in row["metrics"]]
    rows = [row for row in found if math.isfinite(row["metrics"][metric])]
    with picture(file, (7, 4.5)) as figure:
        axes = figure.add_subplot()
        log_scale_if_wide(axes, [row["metrics"][metric] for row in rows])
        _draw_dense(axes, rows, metric)
        _draw_pruned(axes, [row for row in rows if row["method"]], metric)
        axes.set_xlabel("sparsity of the pruned linears (%)")
        absent = f"\n({len(found) - len(rows)} of {len(found)} are not finite)" if len(rows) < len(found) else ""
        axes.set_ylabel(metric.removeprefix("val/") + absent)
        axes.grid(alpha=0.3)
        _, names = axes.get_legend_handles_labels()
        if names and max(map(len, names)) <= LONG:
            axes.legend(fontsize="small")
        elif names:  # it would cover the curves
            figure.set_figheight(4.5 + 0.2 * len(names))
            figure.legend(fontsize="x-small", loc="outside lower left")
        if models := comparison.models():
            axes.set_title("; ".join(models), fontsize="x-small", loc="left")


def _draw_dense(axes: Any, rows: Sequence[dict[str, Any]], metric: str) -> None:
    """Draw a level for each dense model."""
    dense = [row for row in rows if row["stage"] in ("dense", "as loaded")]
    named = [(", ".join(filter(None, (row["stage"], row["of"]))), row["metrics"][metric]) for row in dense]
    for number, (name, level) in enumerate(dict.fromkeys(named)):  # runs may share it and have other metrics besides
        axes.axhline(level, color="0.5", linestyle=LEVELS[number % len(LEVELS)], label=name)


def _draw_pruned(axes: Any, rows: Sequence[dict[str, Any]], metric: str) -> None:
    """Draw a line for each method, stage and pattern."""
    from matplotlib.ticker import MultipleLocator

    series: dict[tuple[str, str, str], list[Point]] = {}
    for row in rows:
        points = series.setdefault((row["method"], row["stage"], row["pattern"]), [])
        points.append((round(100 * row["sparsity"], 2), row["metrics"][metric]))
    labels = list(dict.fromkeys(label for label, _, _ in series))
    for (label, stage, pattern), points in series.items():
        color = f"C{labels.index(label)}"
        unstructured = pattern == "unstructured"
        name = ", ".join([label, *([] if unstructured else [pattern]), *([] if stage == "pruned" else [stage])])
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=color,
            label=name,
            marker="s" if not unstructured else "D" if stage == "merged" else "o",
            markerfacecolor=color if stage in ("pruned", "smaller") else "white",
            linestyle="none" if not unstructured else "-" if stage == "pruned" else "--",
        )
    if series:
        places = [x for points in series.values() for x, _ in points]
        axes.set_xlim(min(places) - 5, max(places) + 5)
    axes.xaxis.set_major_locator(MultipleLocator(10))


def log_scale_if_wide(axes: Any, levels: Sequence[float]) -> None:
    """Make the vertical axis logarithmic if the values are positive and far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if levels and min(levels) > 0 and max(levels) > 8 * min(levels):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
