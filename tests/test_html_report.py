"""The page of a report, read back by an HTML parser."""

from html.parser import HTMLParser

import pytest

from wanda_lightning.html_report import to_html
from wanda_lightning.report import LinearReport, PruningReport

VOID = {"meta", "wbr", "circle", "path", "polyline", "line"}


class Page(HTMLParser):
    """Collects the text of every table cell, attributes that load something, and tags that do not match."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.cells, self.titles, self.loads = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in VOID else [tag]
        self.cells += [""] if tag in ("td", "th") else []
        self.titles += [value for name, value in attributes if name == "title"]
        self.loads += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


@pytest.fixture
def report():
    report = PruningReport("Some<Method>", "2:4", 0.5, seconds=3.0, calibration={"source": "a & b.txt"})
    for layer in (0, 1):
        for number, name in enumerate(("mlp.experts.0.up", "mlp.experts.1.up", "attn.q")):
            row = f"layers.{layer}.{name}", f"layers.{layer}", (8, 8), 0.5, 0.25, 10, 0.1 * layer + 0.01 * number, True
            report.linears.append(LinearReport(*row))
    report.evaluations = {"dense": {"val/perplexity": 12.345}}
    report.not_pruned = {"layers.0.gate": "router"}
    return report


def test_every_figure_is_there_once(report):
    page = Page(to_html(report))
    start = page.cells.index("layer")
    assert page.cells[start : start + 9] == [
        "layer", "mlp.experts.*.up", "attn.q", "0", "0.0050", "0.0200", "1", "0.1050", "0.1200",
    ]  # fmt: skip
    assert page.titles == ["sparsity 50.00%"] * 4
    assert page.cells[:4] == ["evaluation", "dense", "val/perplexity", "12.35"]
    assert page.cells[4:8] == ["not pruned, because", "matrices", "router", "1"]
    settings = dict(zip(page.cells[start + 9 :: 2], page.cells[start + 10 :: 2], strict=True))
    assert settings["source"] == "a & b.txt"
    assert settings["seconds to choose masks and update weights"] == "1.5"
    assert settings["seconds for all else, mostly forward passes"] == "1.5"


def test_nothing_is_loaded_and_names_are_escaped(report):
    page = to_html(report)
    assert Page(page).loads == []
    assert "http" not in page
    assert "url(" not in page
    assert "Some<Method>" not in page


def test_estimates_are_marked(report):
    report.linears = [
        LinearReport(r.name, r.layer, r.shape, r.sparsity, r.seconds, r.tokens, r.error) for r in report.linears
    ]
    assert "~0.1050" in Page(to_html(report)).cells


def test_without_calibration_there_is_no_map(report):
    report.linears = [LinearReport(r.name, r.layer, r.shape, r.sparsity, r.seconds) for r in report.linears]
    page = to_html(report)
    assert "econstruction error" not in page
    assert "sparsity 0.5" in page


def test_it_lies_beside_the_json(report, tmp_path):
    report.save(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == to_html(report)
