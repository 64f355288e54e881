"""Bars on the terminal: one for each stage, all alike; where there is no terminal, a plain line when it ends."""

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

Step = TypeVar("Step")
ROOM = 50  # columns of a terminal: figures come before the bar


class TimeLeft(ProgressColumn):
    """How long it will take, then how long it took."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Write it for one bar."""
        seconds = task.finished_time if task.finished else task.time_remaining
        if seconds is None:
            return Text("")
        time = timedelta(seconds=int(seconds))
        return Text(f"in {time}" if task.finished else f"{time} left", style="dim")


class Note(ProgressColumn):
    """What a function says.

    Args:
        say: The function.
    """

    max_refresh = 0.5

    def __init__(self, say: Callable[[], str]) -> None:
        super().__init__()
        self.say = say

    def render(self, task: Task) -> Text:
        """Write it for one bar."""
        return Text(self.say(), style="dim")


def columns(console: Console, unit: str = "", note: Callable[[], str] | None = None) -> list[ProgressColumn]:
    """Return what a bar shows: the stage, the bar, how many of how many, the time, and a note.

    Args:
        console: Where it is shown.
        unit: What is counted, such as ``layers``.
        note: Says what comes last.

    Returns:
        Columns for rich.
    """
    count = f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}".strip()
    bar = [BarColumn()] if console.is_terminal and console.width >= ROOM else []
    notes = [Note(note)] if note else []
    return [TextColumn("{task.description:<10}"), *bar, TextColumn(count), TimeLeft(), *notes]


def progress(stage: str, total: int, unit: str = "", note: Callable[[], str] | None = None) -> Progress:
    """Make a bar, which a ``with`` shows.

    Args:
        stage: What goes on.
        total: How many steps there are.
        unit: See :func:`columns`.
        note: See :func:`columns`.

    Returns:
        A display of rich with one task, number 0.
    """
    console = get_console()  # one for all: rich then shows bars within bars
    bars = Progress(*columns(console, unit, note), console=console)
    bars.add_task(stage, total=total)
    return bars


def track(
    steps: Iterable[Step], total: int, stage: str, unit: str = "", note: Callable[[], str] | None = None
) -> Iterator[Step]:
    """Pass steps on, and show how many have been.

    Args:
        steps: The steps.
        total: How many there are.
        stage: See :func:`progress`.
        unit: See :func:`columns`.
        note: See :func:`columns`.

    Yields:
        The steps.
    """
    with progress(stage, total, unit, note) as bars:
        yield from bars.track(steps, task_id=bars.task_ids[0])
