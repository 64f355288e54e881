"""What the model said, in each form of a report."""

import html
import io
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from wanda_lightning.report.html.page import to_html
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.report.samples import one_line, samples_table
from wanda_lightning.report.tables import markdown_table

SAID = {
    "dense": {"Water boils": " at 100 °C.\nIt is | hot *there*.", "<b>": " yes"},
    "pruned": {"Water boils": " \x1b[31mwhen " + "it is hot and " * 20},
}


@pytest.fixture
def report() -> PruningReport:
    return PruningReport("Wanda(variant=False)", "2:4", 0.5, samples=SAID)


def test_the_table_has_a_row_a_prompt():
    header, rows = samples_table(SAID)
    assert header == ["the model continues", "dense", "pruned"]
    assert rows[0][:2] == ["Water boils", "at 100 °C. It is | hot *there*."]
    assert rows[1] == ["<b>", "yes", ""]
    assert samples_table({}) is None
    assert samples_table({"dense": {}}) is None


@pytest.mark.parametrize(
    "cell",
    [
        "model.layers.*.mlp.*",
        "at 100 °C. It is | hot *there*.",
        "<b>",
        "__init__ of a_name_ _here_",
        "`x` ~~y~~ ~z~ [a](b) \\| C:\\*",
        "~0.0123",
        "val/perplexity",
    ],
)
def test_a_reader_of_markdown_sees_a_cell_as_it_is(cell):
    lines = markdown_table(["what", cell], [[cell, "1"]])
    parsed = MarkdownIt().enable(["table", "strikethrough"]).parse("\n".join(lines))
    found = [[(part.type, part.content) for part in token.children] for token in parsed if token.type == "inline"]
    assert [{kind for kind, _ in parts} for parts in found] == [{"text"}] * 4
    assert ["".join(text for _, text in parts) for parts in found] == ["what", cell, cell, "1"]


def test_nothing_that_moves_the_cursor_is_shown():
    assert one_line("a\x1b[2J\r\nb\x07") == "a [2J b"


def test_on_the_terminal_a_line_each_unless_more_is_asked_for(report):
    shown = {}
    for details in (False, True):
        console = Console(width=60, file=io.StringIO())
        console.print(report.to_table(details))
        lines = console.file.getvalue().splitlines()
        start = lines.index("Water boils")
        shown[details] = lines[start:]
        assert all(len(line) <= 60 for line in lines)
    assert shown[False][1].rstrip() == "  dense  ... at 100 °C. It is | hot *there*."
    assert len(shown[False]) == 6
    assert shown[False][2].rstrip().endswith("…")
    assert len(shown[True]) > 9
    assert " ".join(shown[True]).count("hot") == 21


def test_in_a_notebook():
    """Its tables hold what the evaluations and texts do; nothing is loaded and nothing is run."""
    report = PruningReport("Wanda(variant=False)", "2:4", 0.5, samples=SAID)
    report.evaluations = {"dense": {"val/perplexity": 12.345}, "pruned": {"val/perplexity": 20.0}}
    cells = []

    class Page(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag in ("div", "b", "p", "table", "tr", "td", "th")
            if tag in ("td", "th"):
                cells.append("")

        def handle_data(self, data):
            if cells:
                cells[-1] += data

    page = report._repr_html_()
    Page().feed(page)
    assert cells[:6] == ["evaluation", "dense", "pruned", "val/perplexity", "12.35", "20" + report.summary]
    assert cells[9:11] == ["Water boils", "at 100 °C. It is | hot *there*."]
    assert len(page) < 5000


def test_the_page_shows_texts_as_they_are(report):
    page = to_html(report)
    assert "<h3>&lt;b&gt;</h3>" in page
    found = []

    class Page(HTMLParser):
        def handle_data(self, data):
            found.append(data)

    Page().feed(page)
    assert "… at 100 °C.\nIt is | hot *there*." in "".join(found)
    assert html.escape(SAID["pruned"]["Water boils"]) in page
    assert "What the model says" not in to_html(PruningReport("Wanda()", "2:4", 0.5))
