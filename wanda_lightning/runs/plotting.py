"""A picture of a comparison: a metric against sparsity, one line for each method (matplotlib, the extra ``[plot]``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_lightning.atomic_files import whole_file

if TYPE_CHECKING:
    from wanda_lightning.runs.comparison import Comparison

SUFFIXES = (".png", ".svg")
STEP = 9  # points between the squares of N:M patterns at one sparsity
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


def plot(comparison: "Comparison", file: str | Path, metric: str | None = None) -> None:
    """Draw a metric of several runs against their sparsity, one line for each method.

    N:M patterns are squares to the right of their sparsity, so that they do not hide what is unstructured; fine-tuned
    models have hollow markers and dashed lines; the dense model is a level.

    Args:
        comparison: The runs.
        file: Where the picture goes; its suffix, .png or .svg, says what it is.
        metric: The metric's name. Default: the first perplexity.

    Raises:
        ValueError: If no run has that metric, the file is neither PNG nor SVG, or matplotlib is not installed.
    """
    path = check(file)
    rows = comparison.rows()
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    if metric is None:
        metric = next((name for name in names if "perplexity" in name), None)
    if metric is None or metric not in names:
        raise ValueError(f"no run has the metric {metric or 'perplexity'!r}; they have {', '.join(names) or 'none'}")
    rows = [row for row in rows if metric in row["metrics"]]

    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator
    from matplotlib.transforms import offset_copy

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot()
    levels = [row["metrics"][metric] for row in rows]
    log_scale_if_wide(axes, levels)
    labels = list(dict.fromkeys(row["method"] for row in rows if row["method"]))
    for row in rows:
        if row["stage"] in ("dense", "as loaded"):
            axes.axhline(row["metrics"][metric], color="0.5", linestyle=":", label=row["stage"])
    patterns: dict[float, list[str]] = {}
    for number, label in enumerate(labels):
        own = [row for row in rows if row["method"] == label]
        beside = offset_copy(axes.transData, figure, x=STEP * (number + 1), units="points")
        for stage in dict.fromkeys(row["stage"] for row in own):
            style: dict[str, Any] = {"color": f"C{number}", "linestyle": "-" if stage == "pruned" else "--"}
            style["markerfacecolor"] = style["color"] if stage == "pruned" else "white"
            name = label if stage == "pruned" else f"{label}, {stage}"
            points = sorted(
                _point(row, metric) for row in own if row["stage"] == stage and row["pattern"] == "unstructured"
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="D" if stage == "merged" else "o", label=name, **style)
            for row in own:
                if row["stage"] == stage and row["pattern"] != "unstructured":
                    x, y = _point(row, metric)
                    axes.plot([x], [y], marker="s", transform=beside, **style | {"linestyle": "none"},
                              label=None if points else f"{name} ({row['pattern']})")  # fmt: skip
                    patterns.setdefault(x, []).append(row["pattern"])
    for x, found in patterns.items():  # once above the picture: beside every point the names would overlap
        axes.annotate(
            f"■ {', '.join(dict.fromkeys(found))}", (x, 1), xycoords=("data", "axes fraction"), fontsize="small",
            xytext=(STEP * (len(labels) + 1) / 2, 4), textcoords="offset points", ha="center",
        )  # fmt: skip
    axes.dataLim.update_from_data_y(levels, ignore=True)  # what is drawn beside its place does not count otherwise
    axes.autoscale_view(scalex=False)
    pruned = [_point(row, metric)[0] for row in rows if row["method"]]
    if pruned:
        axes.set_xlim(min(pruned) - 5, max(pruned) + 5)
    axes.xaxis.set_major_locator(MultipleLocator(10))
    axes.set_xlabel("sparsity of the pruned linears (%)")
    axes.set_ylabel(metric.removeprefix("val/"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    if models := comparison.models():
        figure.text(0.01, 0.01, "; ".join(models), fontsize="x-small")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished)


def log_scale_if_wide(axes: Any, levels: Sequence[float]) -> None:
    """Make the vertical axis logarithmic if the values are positive and far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if min(levels) > 0 and max(levels) > 8 * min(levels):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _point(row: dict[str, Any], metric: str) -> Point:
    return round(100 * row["sparsity"], 2), row["metrics"][metric]
