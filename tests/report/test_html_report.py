"""The page of a report, read back by an HTML parser."""

import math
import re
from html.parser import HTMLParser

import pytest

from wanda_lightning.report.html.charts import breakable, lines
from wanda_lightning.report.html.page import to_html
from wanda_lightning.report.linear_report import LinearReport
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.report.weight_magnitudes import Magnitudes

VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Collects text by element, the places of marks, attributes that load something, and tags that do not match."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.cells, self.titles, self.loads, self.rects, self.text = [], [], [], [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in VOID else [tag]
        self.cells += [""] if tag in ("td", "th") else []
        self.titles += [""] if tag == "title" else []
        self.rects += [{"title": self.titles[-1], **dict(attributes)}] if tag == "rect" else []
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.loads += [tag] if tag in ("script", "link", "iframe", "object", "embed", "img", "base") else []

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if self.open and self.open[-1] == "title":
            self.titles[-1] += data
        elif "style" not in self.open:
            self.text += data

    def table(self, *header: str) -> list[str]:
        """The cells from a header on."""
        starts = [n for n in range(len(self.cells)) if self.cells[n : n + len(header)] == list(header)]
        assert len(starts) == 1
        return self.cells[starts[0] + len(header) :]


@pytest.fixture
def report():
    report = PruningReport("Some<Method>", "2:4", 0.5, seconds=3.0, calibration={"source": "a & b.txt"})
    for layer in (0, 1):
        for number, name in enumerate(("mlp.experts.0.up", "mlp.experts.1.up", "attn.q")):
            row = f"layers.{layer}.{name}", f"layers.{layer}", (8, 8), 0.5, 0.25, 10, 0.1 * layer + 0.01 * number, True
            report.linears.append(LinearReport(*row))
    report.evaluations = {"dense": {"val/perplexity": 12.345}}
    report.not_pruned = {"layers.0.gate": "router", "layers.1.gate": "router", "layers.3.attn.q": "ignored"}
    report.seconds_by_phase = {"forward": 0.75, "solve": 1.5}
    report.memory = {"peak process memory": 3 * 2**30}
    return report


def test_evaluations_settings_and_what_was_not_pruned(report):
    page = Page(to_html(report))
    assert page.cells[:4] == ["evaluation", "dense", "val/perplexity", "12.35"]
    assert page.table("matrices", "because", "how many")[:6] == ["gate", "router", "2", "attn.q", "ignored", "1"]
    start = page.cells.index("method")
    settings = dict(zip(page.cells[start::2], page.cells[start + 1 :: 2], strict=True))
    assert settings["source"] == "a & b.txt"
    assert settings["method"] == "Some<Method>"
    assert settings["target sparsity"] == "0.5"


def test_errors_and_sparsities_by_layer_and_kind(report):
    report.linears[2] = LinearReport("layers.0.attn.q", "layers.0", (8, 8), 0.25, 0.25, 10, 0.02, True)
    page = Page(to_html(report))
    figures = [n for n, cell in enumerate(page.cells) if cell == "layer"]
    tables = [page.cells[n : n + 12] for n in figures]
    head = ["layer", "mlp.experts.*.up", "attn.q"]
    assert tables == [  # layer 3 was left dense, which the map shows as a gap
        [*head, "0", "0.0050", "0.0200", "1", "0.1050", "0.1200", "3", "", ""],
        [*head, "0", "50.00 %", "25.00 %", "1", "50.00 %", "50.00 %", "3", "", ""],
    ]
    cells = [title for title in page.titles if "layer" in title]
    assert cells == [
        "mlp.experts.*.up, layer 0: 0.0050", "mlp.experts.*.up, layer 1: 0.1050",
        "attn.q, layer 0: 0.0200", "attn.q, layer 1: 0.1200",
        "mlp.experts.*.up, layer 0: 50.00 %", "mlp.experts.*.up, layer 1: 50.00 %",
        "attn.q, layer 0: 25.00 %", "attn.q, layer 1: 50.00 %",
    ]  # fmt: skip
    shades = [float(rect["fill-opacity"]) for rect in page.rects if "fill-opacity" in rect]
    assert shades[:4] == pytest.approx([(error / 0.12) ** 0.5 for error in (0.005, 0.105, 0.02, 0.12)], abs=1e-3)


@pytest.mark.parametrize("dense", [{"layers.3.attn.q": "ignored"}, {}])
def test_empty_cells_are_spoken_of_where_there_are_some(report, dense):
    report.linears[2] = LinearReport("layers.0.attn.q", "layers.0", (8, 8), 0.25, 0.25, 10, 0.02, True)
    report.not_pruned = dense
    page = Page(to_html(report))
    assert ("Empty cells were not pruned." in page.text) == bool(dense)
    assert ("Of the layers every linear was pruned." in page.text) == (not dense)


def test_names_of_layers_are_told_from_numbers(report):
    """On a phone there is no room for six of them side by side."""
    report.linears.append(LinearReport("others.0.attn.q", "others.0", (8, 8), 0.5, 0.25, 10, 0.02, True))
    assert to_html(report).count('class="axis long"') == 3


def test_lines_are_drawn_to_scale(report):
    page = to_html(report)
    dots = re.findall(r'class="dots"[^>]* d="M0.5 ([\d.]+)h0M1.5 ([\d.]+)h0"', page)
    heights = [[100 - float(y) for y in pair] for pair in dots]
    assert len(heights) == 2
    for (first, second), (low, high) in zip(heights, ((0.005, 0.105), (0.02, 0.12)), strict=True):
        assert first / second == pytest.approx(low / high, rel=0.01)
    assert heights[0][1] / heights[1][1] == pytest.approx(0.105 / 0.12, rel=0.01)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_a_gap_in_a_line(value):
    with_gap = lines({"error": [1.0, None, 2.0]}, ["0", "1", "2"], "{:g}".format)
    assert lines({"error": [1.0, value, 2.0]}, ["0", "1", "2"], "{:g}".format) == with_gap


def test_kept_and_pruned_weights_by_magnitude(report):
    report.magnitudes = {"attn.q": Magnitudes({-4: 30, -16: 20}, {-16: 40, -127: 10})}
    page = Page(to_html(report))
    shown = [title for title in page.titles if " to " in title]
    assert shown == ["0.0625 to 0.0743: 60.00% of the weights, 33% of them kept",
                     "0.5 to 0.595: 30.00% of the weights, 100% of them kept"]  # fmt: skip
    assert "10.00% of the weights were zero already" in page.text
    heights = [float(rect["height"]) for rect in page.rects if rect["title"] == shown[0]]
    assert heights[1] == pytest.approx(2 * heights[0], rel=1e-3)  # 40 pruned on top of 20 kept


def test_time_and_memory(report):
    page = Page(to_html(report))
    assert "forward0.75 s (25%)solve1.50 s (50%)other0.75 s (25%)" in page.text
    assert "peak process memory3.0 GiB" in page.text
    assert "mlp.experts.*.up1.00 sattn.q0.50 s" in page.text


def test_names_break_behind_their_parts_and_numbers_do_not():
    assert breakable("val/mlp.up_proj, sparsity 0.5") == "val/<wbr>mlp.<wbr>up_<wbr>proj, sparsity 0.5"


def test_nothing_is_loaded_and_names_are_escaped(report):
    evil = '<b onload="x">&\'"'
    report.linears.append(LinearReport(f"layers.0.{evil}", "layers.0", (8, 8), 0.5, 0.25, 10, 0.1, True))
    report.evaluations[evil] = {evil: 1.0}
    report.not_pruned[f"layers.0.x{evil}"] = evil
    report.matches, report.memory[evil], report.seconds_by_phase[evil] = {evil: 1}, 1, 0.1
    report.magnitudes = {evil: Magnitudes({-4: 1})}
    page = to_html(report)
    assert Page(page).loads == []
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert "<b " not in page
    assert "Some<Method>" not in page
    assert Page(page).cells.count(evil) == 6  # in four tables, and as the head of a column and a row in the first


def test_estimates_are_marked(report):
    report.linears = [
        LinearReport(r.name, r.layer, r.shape, r.sparsity, r.seconds, r.tokens, r.error) for r in report.linears
    ]
    assert "~0.1050" in Page(to_html(report)).cells


def test_experts_that_no_token_reached_are_counted(report):
    report.linears[0] = LinearReport("layers.0.mlp.experts.0.up", "layers.0", (8, 8), 0.5, 0.25, 0, None)
    page = Page(to_html(report))
    assert "No calibration token reached 1 matrices" in page.text
    assert "mlp.experts.*.up, layer 0: 0.0100" in page.titles  # the mean of those that have one


def test_without_calibration_there_is_no_map_of_errors(report):
    report.linears = [LinearReport(r.name, r.layer, r.shape, r.sparsity, r.seconds) for r in report.linears]
    page = Page(to_html(report))
    assert "Not measured: without calibration" in page.text
    assert [title for title in page.titles if "layer" in title] == [
        f"{kind}, layer {layer}: 50.00 %" for kind in ("mlp.experts.*.up", "attn.q") for layer in (0, 1)
    ]


def test_a_report_of_nothing_is_a_page():
    page = Page(to_html(PruningReport("Wanda()", "2:4", 0.5)))
    assert "The model was not evaluated" in page.text
    assert not page.rects


def test_errors_of_zero_and_a_single_layer_are_drawn(report):
    report.not_pruned = {}
    report.linears = [LinearReport("layers.0.q", "layers.0", (8, 8), 0.0, 0.0, 10, 0.0, True)]
    page = Page(to_html(report))
    assert {rect["fill-opacity"] for rect in page.rects} == {"0.000"}


def test_it_lies_beside_the_json(report, tmp_path):
    report.save(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == to_html(report)
