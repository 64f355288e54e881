"""What was taken out of a model so that it is truly smaller, as JSON and Markdown."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_lightning.atomic_files import write_text
from wanda_lightning.json_files import write_json
from wanda_lightning.report.environment import environment
from wanda_lightning.report.html.shrinking_page import to_html
from wanda_lightning.report.pruning_report import name_of_model
from wanda_lightning.report.tables import Table, evaluation_table, in_bytes, markdown_table, terminal_table

if TYPE_CHECKING:
    from rich.console import Group

SHRINKING = "shrinking.json"
SHRINKING_FILES = (SHRINKING, "shrinking.md", "shrinking.html")
"""All the files that it is written to: for programs, as Markdown, and as a page."""


@dataclass
class ShrinkReport:
    """What one pruning of shapes took out of a model.

    Attributes:
        removed: What: ``neurons`` or ``layers``.
        settings: What was asked for.
        sizes: Numbers of the config before and after, such as ``{"intermediate_size": (1536, 1216)}``.
        parameters: Number of parameters before and after.
        bytes: Their bytes before and after.
        figure: What ``figures`` are, such as ``error``.
        figures: A figure for each part that was looked at: the matrices that read neurons, or the decoder layers.
        gone: The parts that are no longer there, by the names they had; empty where all became smaller.
        kept: What it takes to make the same shapes again: each width with how many go together and how many are left,
            or the numbers of the layers that stay.
        tokens: Calibration tokens; None where none were needed.
        seconds: Time it took.
    """

    removed: str
    settings: dict[str, Any]
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    figure: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    tokens: int | None = None
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """What became of the numbers, in a few words: ``intermediate_size 1536 -> 1216``."""
        return ", ".join(f"{name} {before} -> {after}" for name, (before, after) in self.sizes.items()) or "unchanged"

    @property
    def summary(self) -> str:
        """One sentence of totals."""
        return f"{self.title}: {change_of(self.parameters, self.bytes)}, in {self.seconds:.1f} s."

    def __repr__(self) -> str:
        return self.summary

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ShrinkReport":
        """Read back what :meth:`to_dict` gave, also from JSON."""
        pairs = {name: tuple(plain[name]) for name in ("parameters", "bytes")}
        return cls(**plain | pairs | {"sizes": {name: tuple(each) for name, each in plain["sizes"].items()}})

    def table(self) -> Table:
        """Return the figures."""
        gone = set(self.gone)
        rows = [
            [name, f"{value:.4g}", *(["removed" if name in gone else ""] if gone else [])]
            for name, value in self.figures.items()
        ]
        return [self.removed, self.figure, *([""] if gone else [])], rows


@dataclass
class Shrinking:
    """All that was taken out of the model of a run, and what it was worth before and after.

    Attributes:
        steps: What was done, in order.
        model: Which model: its ``name`` or path as given, number of ``parameters`` now, and ``dtype``.
        evaluations: Metrics by stage, such as ``{"dense": {"val/perplexity": 29.3}}``.
        calibration: Where the calibration set came from.
        environment: Versions, machine and date.
    """

    steps: list[ShrinkReport] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=environment)

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of parameters before and after."""
        return self.steps[0].parameters[0], self.steps[-1].parameters[1]

    @property
    def bytes(self) -> tuple[int, int]:
        """Their bytes before and after."""
        return self.steps[0].bytes[0], self.steps[-1].bytes[1]

    @property
    def title(self) -> str:
        """What became of the numbers, in a few words."""
        return ", ".join(step.title for step in self.steps)

    @property
    def model_name(self) -> str:
        """The dense model and its size, in a few words."""
        return name_of_model(self.model | {"parameters": self.parameters[0]})

    @property
    def summary(self) -> str:
        """One sentence of totals."""
        return f"{self.title}: {change_of(self.parameters, self.bytes)}."

    def __repr__(self) -> str:
        return self.summary

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain types, the totals first."""
        return {"parameters": self.parameters, "bytes": self.bytes, **asdict(self)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Shrinking":
        """Read back what :meth:`to_dict` gave, also from JSON."""
        rest = {name: value for name, value in plain.items() if name not in ("parameters", "bytes")}
        return cls(**rest | {"steps": [ShrinkReport.from_dict(step) for step in plain["steps"]]})

    def overview(self) -> Iterable[Table]:
        """Yield the evaluations and the sizes."""
        if evaluation := evaluation_table(self.evaluations):
            yield evaluation
        numbers = [(name, *numbers) for step in self.steps for name, numbers in step.sizes.items()]
        rows = [
            [name, f"{before:,}", f"{after:,}"] for name, before, after in [*numbers, ("parameters", *self.parameters)]
        ]
        yield ["", "before", "after"], [*rows, ["bytes", *map(in_bytes, self.bytes)]]

    def to_markdown(self) -> str:
        """Return the summary, and what was looked at in each step, as Markdown."""
        lines = [f"# {self.title}", "", self.summary, ""]
        for header, rows in self.overview():
            lines += [*markdown_table(header, rows), ""]
        for step in self.steps:
            lines += [*markdown_table(*step.table(), left=(0, 2)), ""] if step.figures else []
        return "\n".join(lines)

    def to_table(self, details: bool = True) -> "Group":
        """Return the tables for a rich console, the most wanted last, where the eye is.

        Args:
            details: Whether to show all; else the evaluations and the sizes alone.

        Returns:
            What rich can print.
        """
        from rich.console import Group

        steps = [terminal_table(*step.table(), left=(0, 2)) for step in self.steps if details and step.figures]
        overview = [terminal_table(*table) for table in self.overview()]
        return Group(*steps, f"[bold]{self.title}[/bold]", *reversed(overview), self.summary)

    def save(self, folder: str | Path) -> None:
        """Write ``shrinking.json``, ``shrinking.md`` and ``shrinking.html`` into a folder."""
        plain, markdown, page = (Path(folder) / name for name in SHRINKING_FILES)
        write_json(plain, self.to_dict())
        write_text(markdown, self.to_markdown())
        write_text(page, to_html(self))


def hidden_states_kept(steps: Iterable[ShrinkReport]) -> list[int] | None:
    """Number the hidden states that are left: those that enter the layers which stay, and the last.

    Args:
        steps: What was done, in order.

    Returns:
        The numbers that they had in the dense model; None if no step took layers out.
    """
    kept = None
    for step in (step for step in steps if step.removed == "layers"):
        before = len(step.kept) + len(step.gone)
        kept = [(kept or range(before + 1))[number] for number in (*step.kept, before)]
    return kept


def change_of(parameters: tuple[int, int], size: tuple[int, int]) -> str:
    """Write how a model's size changed."""
    before, after = parameters
    return (
        f"{before:,} parameters became {after:,} ({after / max(1, before) - 1:+.2%}), "
        f"{in_bytes(size[0])} became {in_bytes(size[1])}"
    )
