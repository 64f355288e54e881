"""Plots as SVG and HTML: they fit any width and either colour scheme, move nothing and load nothing.

Marks are drawn in stretched SVGs and text is HTML, so that text keeps its size on a phone.
``style.css`` lays them out.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

from markupsafe import Markup, escape

from wanda_lightning.report.weight_magnitudes import ZERO, Magnitudes

Show = Callable[[float], str]
COLORS = 8


def breakable(name: str) -> Markup:
    """Escape a name and let it break behind dots, slashes and underscores; a number stays whole."""
    return Markup(re.sub(r"(?<=[._/])(?!\d)", "<wbr>", str(escape(name))))


def heat_map(
    series: Mapping[str, Sequence[float | None]], labels: Sequence[str], top: float, show: Show, level: Show, color: str
) -> Markup:
    """Draw a strip of cells for each series, darker for more, with the mean beside it.

    Args:
        series: Values by the series' name, one a label; None leaves a cell empty.
        labels: What the cells stand for, such as layer numbers.
        top: The value of the darkest cell.
        show: Writes a value.
        level: Writes the darkest value in the legend.
        color: Name of the colour in the style sheet.

    Returns:
        HTML.
    """
    strips = ""
    for name, values in series.items():
        cells = ""
        for place, (label, value) in enumerate(zip(labels, values, strict=True)):
            if value is not None:
                cells += (
                    f'<rect x="{place}" width="1" height="1" fill-opacity="{_shade(value, top):.3f}">'
                    f"<title>{escape(name)}, layer {escape(label)}: {show(value)}</title></rect>"
                )
        known = [value for value in values if value is not None]
        strips += (
            f'<div class="name">{breakable(name)}</div><div class="strip"><svg viewBox="0 0 {len(labels)} 1" '
            f'preserveAspectRatio="none" fill="var(--{color})">{cells}</svg></div>'
            f'<div class="mean">{show(sum(known) / len(known)) if known else ""}</div>'
        )
    stops = ", ".join(
        f"color-mix(in srgb, var(--{color}) {100 * _shade(top * part / 8, top):.0f}%, var(--panel))"
        for part in range(9)
    )
    scale = f'0<span class="scale" style="background: linear-gradient(to right, {stops})"></span>{level(top)}'
    return Markup(
        f'<figure><div class="plot">{strips}{_axis(labels)}</div>'
        f"<figcaption>{scale}; a column is a layer, on the right is their mean</figcaption></figure>"
    )


def lines(series: Mapping[str, Sequence[float | None]], labels: Sequence[str], level: Show, low: float = 0) -> Markup:
    """Draw a line for each series over the same labels, from ``low`` up; None, NaN and infinity leave a gap."""
    drawn = [value - low for values in series.values() for value in values if _is_drawn(value)]
    top, levels = _levels(max(drawn, default=0.0))
    marks = "".join(f'<path class="rule" d="M0 {_y(mark, top)}H{len(labels)}"/>' for mark in levels)
    legend = ""
    for number, (name, values) in enumerate(series.items()):
        color, dashed = number % COLORS, number // COLORS
        style = f'stroke="var(--c{color})"' + (f' stroke-dasharray="{2 * dashed + 2} {3 + dashed}"' if dashed else "")
        path, dots, pen = "", "", "M"
        for place, value in enumerate(values):
            if not _is_drawn(value):
                pen = "M"
                continue
            path, pen = f"{path}{pen}{place + 0.5} {_y(value - low, top)}", "L"
            dots += f"M{place + 0.5} {_y(value - low, top)}h0"
        marks += f'<path {style} d="{path}"><title>{escape(name)}</title></path>'
        marks += f'<path class="dots" stroke="var(--c{color})" d="{dots}"/>'
        line = ("solid", "dashed", "dotted")[min(dashed, 2)]
        legend += (
            f'<div>{breakable(name)}<span class="key" style="border-color: var(--c{color}); border-top-style: {line}">'
            "</span></div>"
        )
    texts = "".join(
        f'<span class="level" style="top: {_y(mark, top)}%">{level(low + mark)}</span>'
        for mark in levels
        if mark or low
    )
    return Markup(
        f'<figure class="plot"><div class="legend">{legend}</div><div class="area"><svg '
        f'viewBox="0 0 {len(labels)} 100" preserveAspectRatio="none" role="img">{marks}</svg>{texts}</div>'
        f"{_axis(labels)}</figure>"
    )


def bars(values: Mapping[str, float], show: Show) -> Markup:
    """Draw a bar for each value, with the value behind it; nothing where there are none."""
    if not values:
        return Markup()
    top = max(values.values()) or 1.0
    rows = "".join(
        f'<div class="name">{breakable(name)}</div><div class="bar">'
        f'<i style="width: calc({value / top:.4f} * (100% - 7.5rem))"></i>{escape(show(value))}</div>'
        for name, value in values.items()
    )
    return Markup(f'<div class="plot list">{rows}</div>')


def shares(values: Mapping[str, tuple[float, float, str]]) -> Markup:
    """Draw what is left of each value and what went, as parts of a bar as long as the value was, with a text behind."""
    rows, length = "", "max(25%, 100% - 16rem)"
    for name, (before, after, text) in values.items():
        left = after / max(1, before)
        rows += (
            f'<div class="name">{breakable(name)}</div><div class="bar">'
            f'<i style="width: calc({left:.4f} * {length})"></i>'
            f'<i class="gone" style="width: calc({1 - left:.4f} * {length})"></i>{escape(text)}</div>'
        )
    return Markup(f'<div class="plot list">{rows}</div>')


def strip_of(name: str, labels: Sequence[str], colors: Sequence[str], titles: Sequence[str], text: str) -> Markup:
    """Draw a strip of cells in colours of the style sheet, one a label, with a text beside it."""
    cells = "".join(
        f'<rect x="{place + 0.05}" width="0.9" height="1" fill="var(--{color})"><title>{escape(title)}</title></rect>'
        for place, (color, title) in enumerate(zip(colors, titles, strict=True))
    )
    return Markup(
        f'<figure class="plot"><div class="name">{breakable(name)}</div><div class="strip"><svg '
        f'viewBox="0 0 {len(labels)} 1" preserveAspectRatio="none" role="img">{cells}</svg></div>'
        f'<div class="mean">{escape(text)}</div>{_axis(labels)}</figure>'
    )


def histograms(magnitudes: Mapping[str, Magnitudes]) -> Markup:
    """Draw for each kind how many weights of each magnitude were kept (lower part of a bar) and pruned (upper)."""
    found = {kind: _shares(counts) for kind, counts in magnitudes.items()}
    top = max((sum(both) for bins in found.values() for both in bins.values()), default=0.0)
    # The tail towards zero is long and thin: leave out what would not be seen.
    seen = [b for bins in found.values() for b, both in bins.items() if sum(both) > 0.004 * top]
    if not seen:
        return Markup()
    first, last = min(seen) - 1, max(seen) + 2
    places = {power: (4 * math.log2(10.0**power) - first) / (last - first) for power in range(-12, 10)}
    axis = "".join(
        f'<span style="left: {place:.1%}">10<sup>{power}</sup></span>'
        for power, place in places.items()
        if 0.06 < place < 0.94
    )
    panels = ""
    for kind, bins in found.items():
        marks = ""
        for b in range(first, last):
            kept, pruned = bins.get(b, (0.0, 0.0))
            if kept + pruned == 0:
                continue
            text = (
                f"{2 ** (b / 4):.3g} to {2 ** ((b + 1) / 4):.3g}: {kept + pruned:.2%} of the weights, "
                f"{kept / (kept + pruned):.0%} of them kept"
            )
            low, high = 96 * kept / top, 96 * pruned / top
            marks += f"<g><title>{text}</title>"
            marks += f'<rect x="{b - first}" y="{100 - low:.2f}" width="1" height="{low:.2f}" fill="var(--c0)"/>'
            marks += (
                f'<rect x="{b - first}" y="{100 - low - high:.2f}" width="1" height="{high:.2f}" fill="var(--c1)"/></g>'
            )
        panels += (
            f'<figure class="bars"><figcaption>{breakable(kind)}</figcaption><svg viewBox="0 0 {last - first} 100" '
            f'preserveAspectRatio="none" role="img">{marks}</svg><div class="axis">{axis}</div></figure>'
        )
    return Markup(f'<div class="panels">{panels}</div>')


def _shares(counts: Magnitudes) -> dict[int, tuple[float, float]]:
    """Return the kept and pruned weights of each bin as fractions of all; weights that were zero have no bar."""
    total = sum(counts.kept.values()) + sum(counts.pruned.values())
    bins = sorted((counts.kept.keys() | counts.pruned.keys()) - {ZERO})
    return {b: (counts.kept.get(b, 0) / total, counts.pruned.get(b, 0) / total) for b in bins}


def _shade(value: float, top: float) -> float:
    """Let differences among small values show: they are most of an error map."""
    return math.sqrt(min(1.0, max(0.0, value / top))) if top else 0.0


def _is_drawn(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _levels(most: float) -> tuple[float, list[float]]:
    """Choose three to six round levels from 0 up, and the top of an axis that holds them."""
    if most <= 0:
        return 1.0, [0.0]
    power = 10.0 ** math.floor(math.log10(most))
    step = next(s * power for s in (0.2, 0.5, 1.0, 2.0) if most / (s * power) <= 5)
    levels = [step * n for n in range(math.floor(most / step * 1.0001) + 1)]
    return max(most, levels[-1]) * 1.08, levels


def _y(value: float, top: float) -> str:
    return f"{100 - 100 * value / top:.2f}"


def _axis(labels: Sequence[str]) -> str:
    """Write up to six labels below the middle of their cells."""
    step = max(1, math.ceil((len(labels) - 1) / 5))
    places = list(range(0, len(labels), step))
    if len(labels) - 1 - places[-1] > step / 2:
        places.append(len(labels) - 1)
    texts = "".join(
        f'<span style="left: {100 * (place + 0.5) / len(labels):.2f}%">{escape(labels[place])}</span>'
        for place in places
    )
    kind = "axis" if all(label.isdigit() for label in labels) else "axis long"
    return f'<div class="{kind}">{texts}</div>'
