"""What the model said at each stage, as a table of a report."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

Samples = Mapping[str, Mapping[str, str]]
"""Continuations by stage and prompt."""


def prompts_of(samples: Samples) -> list[str]:
    """List the prompts of all stages, each once."""
    return list(dict.fromkeys(prompt for said in samples.values() for prompt in said))


def one_line(text: str) -> str:
    """Write a text without its line breaks and other characters that are not to be seen."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def samples_table(samples: Samples) -> tuple[list[str], list[list[str]]] | None:
    """Write what was said as Markdown cells: a row for each prompt, a column for each stage; None if nothing was."""
    rows = [
        [_escaped(text) for text in (prompt, *(said.get(prompt, "") for said in samples.values()))]
        for prompt in prompts_of(samples)
    ]
    return (["the model continues", *samples], rows) if rows else None


def samples_lines(samples: Samples, whole: bool) -> "RenderableType":
    """Show what was said on a terminal, the stages below each other.

    Args:
        samples: What was said.
        whole: Whether to show long texts whole; else as far as a line goes.

    Returns:
        What rich can print.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for prompt in prompts_of(samples):
        lines = Table.grid(padding=(0, 1))
        lines.add_column(style="dim")
        lines.add_column(no_wrap=not whole, overflow="fold" if whole else "ellipsis")
        for stage, said in samples.items():
            lines.add_row(f"  {stage}", Text(f"... {one_line(said.get(prompt, ''))}"))
        parts += [Text(one_line(prompt), style="italic"), lines]
    return Group(*parts)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", one_line(text))
