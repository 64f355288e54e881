"""A table on the terminal that fits it: no figure is cut, however narrow the terminal is."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

BORDER, GAP = 1, 3  # what lines and blanks take of the width: on the left, and around each column
NAME, SHORT = 12, 4  # characters of a name that stay in a line, and where there is no room for so many


@dataclass(frozen=True)
class FittingTable:
    """A table for a rich console: where it is narrow names are folded, figures are not.

    Columns for which there is no room follow in further tables, behind the first column.

    Args:
        header: Names of the columns.
        rows: Their texts.
        left: Numbers of the columns that are text; the others are figures.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Table]":
        """Lay it out for the width of a console."""
        from rich.cells import cell_len

        columns = [[name, *(row[number] for row in self.rows)] for number, name in enumerate(self.header)]
        whole = [max(map(cell_len, column)) for column in columns]
        least = [self._least(number, column) for number, column in enumerate(columns)]
        room = options.max_width - BORDER - GAP - least[0]
        parts: list[list[int]] = [[]]
        for number in range(1, len(columns)):
            if parts[-1] and sum(least[each] + GAP for each in [*parts[-1], number]) > room:
                parts.append([])
            parts[-1].append(number)
        for part in parts:
            widths = {number: whole[number] for number in [0, *part]}
            while BORDER + sum(width + GAP for width in widths.values()) > options.max_width:
                wide = [number for number, width in widths.items() if width > least[number]]
                if not wide and widths[0] <= SHORT:
                    break
                widths[max(wide, key=lambda number: widths[number], default=0)] -= 1
            yield self._table(widths)

    def _least(self, number: int, column: Sequence[str]) -> int:
        """Return how narrow a column may be: names may be folded, but not the words of a figure."""
        from rich.cells import cell_len

        header, *cells = (max(map(cell_len, text.split()), default=1) for text in column)
        longest = max(cells, default=1)
        return max(min(header, NAME), min(longest, NAME) if number in self.left else longest)

    def _table(self, widths: Mapping[int, int]) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for number, width in widths.items():
            justify: Literal["left", "right"] = "left" if number in self.left else "right"
            table.add_column(Text(self.header[number]), justify=justify, overflow="fold", width=width)
        for row in self.rows:
            table.add_row(*(Text(row[number]) for number in widths))  # rich would take [qk]_proj for markup
        return table
