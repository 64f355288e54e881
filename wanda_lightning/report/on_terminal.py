"""A report on the terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wanda_lightning.report.linear_report import ERROR, mean_error
from wanda_lightning.report.samples import Samples, one_line, prompts_of, samples_table
from wanda_lightning.report.tables import terminal_table

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from wanda_lightning.report.pruning_report import PruningReport


def to_table(report: "PruningReport", details: bool) -> "Group":
    """Lay a report out; see :meth:`PruningReport.to_table`."""
    from rich.console import Group
    from rich.markup import escape

    evaluation, said = report.evaluation_table(), samples_table(report.samples)
    others = [table for table in report.tables() if table not in (evaluation, said)] if details else []
    error = [ERROR] if details and mean_error(report.linears) is not None else []
    return Group(
        *(terminal_table(*table) for table in reversed(others)),
        *error,
        f"[bold]{escape(report.title)}[/bold]",
        *([f"Model: {escape(report.model_name)}."] if report.model else []),
        *([terminal_table(*evaluation)] if evaluation else []),
        report.summary,
        *_said(report.samples, whole=details),
    )


def _said(samples: Samples, whole: bool) -> Iterator["RenderableType"]:
    """Show what was said, the stages below each other; each as far as a line goes, or whole."""
    from rich.text import Text

    width = max(map(len, samples), default=0)
    for prompt in prompts_of(samples):
        yield Text(one_line(prompt), style="italic")
        for stage, said in samples.items():
            line = Text(no_wrap=not whole, overflow="fold" if whole else "ellipsis")
            yield line.append(f"  {stage:<{width}}", "dim").append(f" ... {one_line(said.get(prompt, ''))}")
