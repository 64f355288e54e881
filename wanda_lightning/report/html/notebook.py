"""A report in a notebook: what one came for, in a few lines of HTML that need no style sheet."""

from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from wanda_lightning.report.samples import samples_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wanda_lightning.report.pruning_report import PruningReport


def to_notebook(report: "PruningReport") -> str:
    """Write the evaluations, the totals and what the model said.

    Args:
        report: What a pruning did.

    Returns:
        HTML.
    """
    parts = [Markup("<b>{}</b>").format(report.title)]
    if evaluation := report.evaluation_table():
        parts.append(_table(*evaluation))
    parts.append(Markup("<p>{}</p>").format(report.summary))
    if samples := samples_table(report.samples):
        parts.append(_table(*samples, "left"))
    return str(Markup("<div>{}</div>").format(Markup().join(parts)))


def _table(header: "Sequence[str]", rows: "Iterable[Sequence[str]]", align: str = "right") -> Markup:
    def row(cells: "Sequence[str]", tag: str) -> str:
        first, *others = map(escape, cells)
        style = f'style="text-align: {align}; vertical-align: top"'
        written = "".join(f"<{tag} {style}>{cell}</{tag}>" for cell in others)
        return f'<tr><{tag} style="text-align: left; vertical-align: top">{first}</{tag}>{written}</tr>'

    return Markup(f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>")
