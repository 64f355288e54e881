import json
from dataclasses import replace
from importlib.metadata import version
from io import StringIO

import pytest
import torch
from rich.console import Console

from wanda_lightning.atomic_files import write_text
from wanda_lightning.engine.measured_sparsity import measure_whole_model
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.methods import Magnitude, Wanda
from wanda_lightning.report.html.page import to_html
from wanda_lightning.report.model_card import model_card
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Unstructured


@pytest.fixture
def report(llama, batches) -> PruningReport:
    report = prune_model(llama, batches, Wanda(), Unstructured(0.5), ignore=["down_proj"])
    report.evaluations = {"dense": {"val/perplexity": 12.345}, "pruned": {"val/perplexity": 23.456, "sparsity": 0.5}}
    return report


def test_json_holds_everything_and_reads_back(report, tmp_path):
    report.save(tmp_path)
    plain = json.loads((tmp_path / "pruning.json").read_text())
    assert plain["method"] == "Wanda(variant=False)"
    assert plain["sparsity"] == 0.5
    assert plain["linears"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert plain["linears"][0]["tokens"] == 128
    assert plain["evaluations"]["pruned"]["val/perplexity"] == 23.456
    assert plain["environment"]["torch"] == version("torch")
    assert PruningReport.from_dict(plain) == report


def test_name_patterns_are_counted_over_all_linears(llama, batches):
    report = prune_model(
        llama, batches, Wanda(), Unstructured(0.5),
        targets=["*_proj"], ignore=["layers.0.*", "down_proj"], allocation={"q_proj": 0.25},
    )  # fmt: skip
    layers = len(llama.model.layers)
    assert report.matches == {"*_proj": 7 * layers, "layers.0.*": 7, "down_proj": layers, "q_proj": layers}
    assert f"| ignored | {7 + layers - 1} |" in report.to_markdown()
    assert f"| down_proj | {layers} |" in report.to_markdown()


def test_totals(report, llama):
    weights = [llama.get_parameter(f"{row.name}.weight") for row in report.linears]
    zeros = sum((weight == 0).sum().item() for weight in weights)
    assert report.sparsity == pytest.approx(zeros / sum(weight.numel() for weight in weights))
    assert report.whole_model_sparsity == pytest.approx(zeros / llama.num_parameters(), abs=1e-4)


@pytest.mark.parametrize("shown", [str, repr])
def test_printed_or_at_the_end_of_a_cell_it_is_a_line_of_totals(report, shown):
    assert shown(report) == f"Wanda, unstructured, sparsity 0.5: {report.summary}"


def test_shared_parameters_count_once():
    from helpers import tiny_llama

    model = tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert measure_whole_model(model) == pytest.approx(model.model.embed_tokens.weight.numel() / model.num_parameters())


def test_tables_show_the_evaluations_and_every_layer(report):
    markdown = report.to_markdown()
    assert "| val/perplexity | 12.35 | 23.46 |" in markdown
    assert "| sparsity |  | 0.5 |" in markdown
    assert "| model.layers.2 | 6 | 7,168 | 50.00% |" in markdown
    console = Console(width=120, record=True, file=StringIO())
    console.print(report.to_table())
    text = console.export_text()
    assert "val/perplexity" in text
    assert "12.35" in text
    assert "model.layers.2" in text
    assert markdown.startswith("# Wanda, unstructured, sparsity 0.5")
    assert "error: how much of the output of a linear, a weight matrix" in markdown


def test_name_patterns_are_shown_as_they_are(llama):
    report = prune_model(llama, None, Magnitude(), Unstructured(0.5), targets=["[qk]_proj"])
    console = Console(width=120, record=True, file=StringIO())
    console.print(report.to_table())
    assert "│ [qk]_proj    │       6 │" in console.export_text()


def test_without_details_the_evaluations_alone_are_shown(report):
    console = Console(width=120, record=True, file=StringIO())
    console.print(report.to_table(details=False))
    first, *lines, last = console.export_text().splitlines()
    assert first == "Wanda, unstructured, sparsity 0.5"
    assert any("12.35 │  23.46" in line for line in lines)
    assert last.startswith("50.00% of the weights of 18 linears are zero")
    assert not any("model.layers" in line or "seconds" in line for line in lines)


@pytest.mark.parametrize(
    ("passes", "order"),
    [
        ([1, 1, 1], "one pass"),
        ([2, 2, 2], "two passes"),
        ([1, 2, 1], "one pass; two in 1 of 3 layers"),
        ([None] * 3, ""),
    ],
)
def test_the_order_is_named_wherever_settings_are(report, passes, order):
    numbers = {f"model.layers.{number}": visits for number, visits in enumerate(passes)}
    report.linears = [replace(row, passes=numbers[row.layer]) for row in report.linears]
    assert report.order == order
    for page, row in (
        (report.to_markdown(), "| order | {} |"),
        (model_card(report), "| order | {} |"),
        (to_html(report), "<td>order</td><td>{}</td>"),
    ):
        assert (row.format(order) in page) == bool(order)
        assert ("order |" in page or "<td>order" in page) == bool(order)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "pruning.json"
    write_text(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["pruning.json"]


def test_the_reconstruction_of_layers_is_told(llama, batches, tmp_path):
    settings = Reconstruction(epochs=1, lr=1e-3)
    report = prune_model(llama, batches, Magnitude(), Unstructured(0.5), reconstruction=settings)
    report.save(tmp_path)
    assert PruningReport.from_dict(json.loads((tmp_path / "pruning.json").read_text())) == report
    first = report.reconstruction["model.layers.0"]
    assert f"| model.layers.0 | {first.before:.4g} | {first.after:.4g} | " in report.to_markdown()
    assert "What was kept of each layer was then trained" in model_card(report)
    page = (tmp_path / "report.html").read_text()
    assert "Reconstruction of layers" in page
    assert "<title>and trained</title>" in page
    assert report.seconds_by_phase["reconstruction"] == pytest.approx(
        sum(layer.seconds for layer in report.reconstruction.values())
    )


def test_without_reconstruction_nothing_is_said_of_it(report, tmp_path):
    report.save(tmp_path)
    assert "econstruction of layers" not in (tmp_path / "report.html").read_text()
    assert "held-out" not in report.to_markdown()
