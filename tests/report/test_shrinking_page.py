"""The page of a model that was made smaller, read back by an HTML parser."""

import re

import pytest
from test_html_report import Page

from wanda_lightning.report.html.shrinking_page import to_html
from wanda_lightning.report.shrinking import Shrinking, ShrinkReport


def narrower(**settings):
    figures = {f"model.layers.{n}.mlp.experts.{e}.w2": 0.1 * n + 0.02 * e for n in range(3) for e in range(2)}
    figures |= {f"model.layers.{n}.attn.o<p": 0.5 for n in range(3)}
    sizes = {"intermediate_size": (64, 48), "num_key_value_heads": (4, 1)}
    return ShrinkReport("neurons", {"keep": 0.75}, sizes, (2000, 1500), (8000, 6000), "error", figures, **settings)


@pytest.fixture
def shrinking():
    figures = {f"model.layers.{n}": value for n, value in enumerate((0.9, 0.125, 0.4))}
    fewer = ShrinkReport(
        "layers", {"layers": 1}, {"num_hidden_layers": (3, 2)}, (1500, 1000), (6000, 4000), "influence", figures,
        gone=["model.layers.1"], kept=[0, 2],
    )  # fmt: skip
    return Shrinking([narrower(), fewer], {"name": "a & b"}, {"dense": {"val/perplexity": 12.345}}, {"source": "a<b"})


def test_printed_or_at_the_end_of_a_cell_it_is_a_line_of_totals(shrinking):
    sizes = "intermediate_size 64 -> 48, num_key_value_heads 4 -> 1, num_hidden_layers 3 -> 2"
    assert repr(shrinking) == f"{sizes}: 2,000 parameters became 1,000 (-50.00%), 7.81 KiB became 3.91 KiB."
    assert str(shrinking.steps[1]).startswith("num_hidden_layers 3 -> 2: 1,500 parameters became 1,000 (-33.33%)")


def test_what_is_left_and_what_went(shrinking):
    page = to_html(shrinking)
    found = re.findall(r'class="name">(.*?)</div><div class="bar"><i style="width: calc\(([\d.]+)', page)
    names = [re.sub("<wbr>", "", name) for name, _ in found]
    assert names == ["intermediate size", "num key value heads", "num hidden layers", "parameters", "bytes"]
    assert [float(left) for _, left in found] == pytest.approx([0.75, 0.25, 2 / 3, 0.5, 0.5], abs=1e-4)
    gone = [float(each) for each in re.findall(r'class="gone" style="width: calc\(([\d.]+)', page)]
    assert gone == pytest.approx([0.25, 0.75, 1 / 3, 0.5, 0.5], abs=1e-4)
    assert all(text in Page(page).text for text in ("64 → 48", "2,000 → 1,000", "7.81 KiB → 3.91 KiB"))


def test_layers_that_went_have_another_colour(shrinking):
    page = Page(to_html(shrinking))
    assert [rect["fill"] for rect in page.rects] == ["var(--c0)", "var(--c1)", "var(--c0)"]
    assert "layer 1: removed, influence 0.125" in page.titles
    assert "layer 2: kept, influence 0.4" in page.titles
    assert "2 of 3" in page.text


def test_figures_are_drawn_and_listed(shrinking):
    text = to_html(shrinking)
    page = Page(text)
    assert page.table("neurons", "error")[:4] == [
        "model.layers.0.mlp.experts.0.w2", "0", "model.layers.0.mlp.experts.1.w2", "0.02",
    ]  # fmt: skip
    assert page.table("layers", "influence", "")[3:6] == ["model.layers.1", "0.125", "removed"]
    kinds = [title for title in page.titles if "layer" not in title or title == "model.layers"]
    assert kinds == ["mlp.experts.*.w2", "attn.o<p", "model.layers"]
    # The experts' means are 0.01, 0.11 and 0.21: the middle of the line is half way between its ends.
    line = next(path for path in re.findall(r'd="(M[^"]*)"><title>mlp.experts', text))
    heights = [float(each) for each in re.findall(r"[ML][\d.]+ ([\d.]+)", line)]
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.01)
    assert heights[0] > heights[2]


def test_the_page_stands_alone_and_escapes_what_it_shows(shrinking):
    page = Page(to_html(shrinking))
    assert page.loads == []
    assert "Model: a & b, 2,000 parameters." in page.text
    assert page.cells[:4] == ["evaluation", "dense", "val/perplexity", "12.35"]
    settings = dict(zip(page.cells[-2::-2], page.cells[-1::-2], strict=False))
    assert settings["source"] == "a<b"
    assert settings["layers: layers"] == "1"


def test_little_is_known(tmp_path):
    unchanged = Shrinking([ShrinkReport("neurons", {"keep": 1.0}, {}, (10, 10), (40, 40), "error")])
    page = Page(to_html(unchanged))
    assert "The model was not evaluated in this run." in page.text
    assert "unchanged" in page.text
    unchanged.save(tmp_path)
    assert Page((tmp_path / "shrinking.html").read_text(encoding="utf-8")).text == page.text
