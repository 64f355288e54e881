"""What the model said at each stage, as a table of a report."""

from collections.abc import Mapping

from wanda_lightning.report.tables import Table

Samples = Mapping[str, Mapping[str, str]]
"""Continuations by stage and prompt."""


def prompts_of(samples: Samples) -> list[str]:
    """List the prompts of all stages, each once."""
    return list(dict.fromkeys(prompt for said in samples.values() for prompt in said))


def one_line(text: str) -> str:
    """Write a text without its line breaks and other characters that are not to be seen."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def samples_table(samples: Samples) -> Table | None:
    """Write what was said: a row for each prompt, a column for each stage; None if nothing was."""
    rows = [
        [one_line(text) for text in (prompt, *(said.get(prompt, "") for said in samples.values()))]
        for prompt in prompts_of(samples)
    ]
    return (["the model continues", *samples], rows) if rows else None
