"""What a report says of how the sparsity was split among linears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wanda_lightning.model.names import name_without_adapters
from wanda_lightning.report.linear_report import LinearReport


@dataclass(frozen=True)
class Allotment:
    """What an allocator has decided, and why, as plain types.

    Attributes:
        allocator: Its name and settings.
        story: What it has found on the way, in a few words.
        figure: What the figures of ``reasons`` are; empty where there are none.
        patterns: By the name of the linear, without adapters, a sparsity or ``"n:m"``.
        reasons: By the name of the linear, the figure that decided.
    """

    allocator: str
    story: str
    figure: str
    patterns: Mapping[str, float | str]
    reasons: Mapping[str, float]

    def reason(self, rows: Sequence[LinearReport]) -> float | None:
        """Average the figures of some linears; None where none of them has one."""
        names = [name_without_adapters(row.name) for row in rows]
        found = [self.reasons[name] for name in names if name in self.reasons]
        return sum(found) / len(found) if found else None

    def __str__(self) -> str:
        return f"{self.allocator}: {self.story}" if self.story else self.allocator
