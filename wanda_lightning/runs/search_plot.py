"""A picture of a search: the metric against sparsity, with the budget drawn in (matplotlib, the extra ``[plot]``)."""

import math
from pathlib import Path

from wanda_lightning.runs.plotting import log_scale_if_wide, picture
from wanda_lightning.runs.search_result import SearchResult


def plot(result: SearchResult, file: str | Path) -> None:
    """Draw the trials of a search, the dense model, the budget, and what was found.

    Args:
        result: The search.
        file: Where the picture goes, a .png or .svg.

    Raises:
        ValueError: If the file is neither PNG nor SVG, or matplotlib is not installed.
    """
    budget = result.budget
    curve = [(100 * trial.sparsity, budget.value(trial.metrics)) for trial in result.curve()]
    points = [(x, y) for x, y in curve if math.isfinite(y)]
    level = budget.level(result.dense)
    with picture(file, (7, 4.5)) as figure:
        axes = figure.add_subplot()
        log_scale_if_wide(axes, [level, *(y for _, y in points)])
        axes.axhline(budget.value(result.dense), color="0.5", linestyle=":", label="dense")
        axes.axhline(level, color="C3", linestyle="--", label="budget")
        label = "calculated" if budget.is_of_size else "tried"
        axes.plot(*zip(*points, strict=True), marker="o", color="C0", label=label)
        if result.found is not None and (trial := result.trial(result.found)):
            x, y = 100 * result.found, budget.value(trial.metrics)
            axes.plot([x], [y], marker="o", markersize=11, markerfacecolor="none", color="C3", linestyle="none",
                      label=f"found: {x:.4g} %")  # fmt: skip
        axes.set_xlabel("sparsity of the pruned linears (%)")
        axes.set_ylabel(f"{budget.name(result.dense).removeprefix('val/')} {budget.measured_on}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        if model := result.settings["model"].get("pretrained"):
            figure.text(0.01, 0.01, str(model), fontsize="x-small")
