"""What was taken out of a model so that it is truly smaller, as JSON and Markdown."""

from dataclasses import asdict, dataclass, field
from typing import Any

from wanda_lightning.report.environment import environment
from wanda_lightning.report.tables import in_bytes, markdown_table


@dataclass
class ShrinkReport:
    """What was taken out of a model.

    Attributes:
        removed: What: ``neurons`` or ``layers``.
        settings: What was asked for.
        sizes: Numbers of the config before and after, such as ``{"intermediate_size": (1536, 1216)}``.
        parameters: Number of parameters before and after.
        bytes: Their bytes before and after.
        figure: What ``figures`` are, such as ``error``.
        figures: A figure for each part that was looked at: the MLPs, or the decoder layers.
        gone: The parts that are no longer there, by the names they had; empty where all became smaller.
        kept: What a checkpoint needs to know to make the same shapes again.
        tokens: Calibration tokens; None where none were needed.
        seconds: Time it took.
        environment: Versions, machine and date.
    """

    removed: str
    settings: dict[str, Any]
    sizes: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    figure: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    kept: Any = None
    tokens: int | None = None
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=environment)

    @property
    def title(self) -> str:
        """What became of the numbers, in a few words: ``intermediate_size 1536 -> 1216``."""
        return ", ".join(f"{name} {before} -> {after}" for name, (before, after) in self.sizes.items()) or "unchanged"

    @property
    def summary(self) -> str:
        """One sentence of totals."""
        (before, after), (bytes_before, bytes_after) = self.parameters, self.bytes
        return (
            f"{self.title}: {before:,} parameters became {after:,} ({after / max(1, before) - 1:+.2%}), "
            f"{in_bytes(bytes_before)} became {in_bytes(bytes_after)}, in {self.seconds:.1f} s."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ShrinkReport":
        """Read back what :meth:`to_dict` gave, also from JSON."""
        pairs = {name: tuple(plain[name]) for name in ("parameters", "bytes")}
        return cls(**plain | pairs | {"sizes": {name: tuple(each) for name, each in plain["sizes"].items()}})

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the figures as a header and rows of text."""
        gone = set(self.gone)
        rows = [
            [name, f"{value:.4g}", *(["removed" if name in gone else ""] if gone else [])]
            for name, value in self.figures.items()
        ]
        return ["part", self.figure, *([""] if gone else [])], rows

    def to_markdown(self) -> str:
        """Return the summary and the figures as Markdown."""
        table = markdown_table(*self.table(), left=(0, 2)) if self.figures else []
        return "\n".join([self.summary, "", *table, ""])
