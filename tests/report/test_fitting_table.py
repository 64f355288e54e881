"""Tables on narrow terminals."""

import re
from io import StringIO

import pytest
from rich.console import Console

from wanda_lightning.report.tables import terminal_table

HEADER = ["decoder layer", "weights", "error", "tokens/s"]
ROWS = [
    ["model.layers.0", "123,456,789", "~0.0646", "12,345.6 (11,000 to 13,000)"],
    ["model.layers.11", "987,654", "~0.1000", "9.87 (9.00 to 10.00)"],
]


def shown(width: int, left: tuple[int, ...] = (0,)) -> str:
    console = Console(width=width, file=StringIO())
    console.print(terminal_table(HEADER, ROWS, left))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 60, 40, 30, 24])
def test_every_figure_is_whole(width):
    figures = {word.strip("()") for row in ROWS for cell in row[1:] for word in cell.split() if word != "to"}
    assert figures <= set(re.findall(r"[~\d.,]+", shown(width)))


@pytest.mark.parametrize("width", [80, 40, 30, 24])
def test_no_line_is_longer_than_the_terminal(width):
    assert max(map(len, shown(width).splitlines())) <= width


def test_names_are_folded_and_not_cut():
    first_column = [line.split("│")[1].strip() for line in shown(24).splitlines() if "│" in line]
    assert "".join(first_column) == 3 * "model.layers.0model.layers.11"


@pytest.mark.parametrize("width", [40, 30])
def test_the_tables_below_begin_with_the_first_column(width):
    assert shown(width).count("decoder") == shown(width).count("┏") > 1


def test_where_there_is_room_columns_are_as_wide_as_what_is_in_them():
    assert shown(200).splitlines()[1] == "┃ decoder layer   ┃     weights ┃   error ┃                    tokens/s ┃"
