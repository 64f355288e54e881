"""What was taken out of a model as one HTML file; ``shrinking.html`` is its template."""

from typing import TYPE_CHECKING, Any

from wanda_lightning.model.names import kind_of, list_of, number_of
from wanda_lightning.report.html.charts import lines, shares, strip_of
from wanda_lightning.report.html.templates import render
from wanda_lightning.report.tables import evaluation_table, in_bytes

if TYPE_CHECKING:
    from wanda_lightning.report.shrinking import Shrinking, ShrinkReport

WHAT = {
    "error": "How much of the output of the matrix that reads them changed, 0 where nothing did, 1 where as much as "
    "there was. Of the experts of a layer the mean is shown.",
    "influence": "How far a layer turns the hidden states, 1 - cosine, mean over the tokens. The least went.",
    "angle": "How far the run of layers that begins here turns the hidden states, as a share of a half turn. The run "
    "with the smallest angle went.",
    "loss without it": "The loss on the calibration set without the layer, when it was last tried.",
}


def to_html(shrinking: "Shrinking") -> str:
    """Write a page with what was removed.

    Args:
        shrinking: What was done, in steps.

    Returns:
        The page, self-contained.
    """
    numbers = {name: pair for step in shrinking.steps for name, pair in step.sizes.items()}
    pairs = {name.replace("_", " "): pair for name, pair in numbers.items()} | {"parameters": shrinking.parameters}
    sizes = {name: (*pair, f"{pair[0]:,} → {pair[1]:,}") for name, pair in pairs.items()}
    sizes["bytes"] = (*shrinking.bytes, " → ".join(map(in_bytes, shrinking.bytes)))
    settings = {f"{step.removed}: {name}": value for step in shrinking.steps for name, value in step.settings.items()}
    return render(
        "shrinking.html",
        report=shrinking,
        evaluation=evaluation_table(shrinking.evaluations),
        sizes=shares(sizes),
        steps=[_step(step) for step in shrinking.steps],
        settings=settings | shrinking.calibration | shrinking.environment,
    )


def _step(step: "ShrinkReport") -> dict[str, Any]:
    header, rows = step.table()
    series, labels = _by_layer(step)
    return {
        "title": step.title,
        "layers": _layers(step) if step.removed == "layers" else "",
        "figure": step.figure,
        "what": WHAT.get(step.figure, ""),
        "lines": lines(series, labels, "{:.3g}".format) if len(labels) > 1 else "",
        "header": header,
        "rows": rows,
    }


def _layers(step: "ShrinkReport") -> Any:
    """Draw the decoder layers, those that went in another colour."""
    gone = {number_of(name) for name in step.gone}
    number = len(step.kept) + len(step.gone)
    figures = {number_of(name): f", {step.figure} {value:.4g}" for name, value in step.figures.items()}
    titles = [f"layer {n}: {'removed' if n in gone else 'kept'}{figures.get(n, '')}" for n in range(number)]
    colors = ["c1" if n in gone else "c0" for n in range(number)]
    return strip_of("decoder layers", [*map(str, range(number))], colors, titles, f"{len(step.kept)} of {number}")


def _by_layer(step: "ShrinkReport") -> tuple[dict[str, list[float | None]], list[str]]:
    """Return the figures of each kind of part by layer, and the numbers of the layers."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, value in step.figures.items():
        parts = name.split(".")
        place = next(n for n, part in enumerate(parts) if part.isdigit())
        kind = kind_of(".".join(parts[place + 1 :])) or list_of(name)
        found.setdefault(kind, {}).setdefault(int(parts[place]), []).append(value)
    places = sorted({place for values in found.values() for place in values})
    series = {
        kind: [sum(each) / len(each) if (each := values.get(place)) else None for place in places]
        for kind, values in found.items()
    }
    return series, [*map(str, places)]
