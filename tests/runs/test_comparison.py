"""The table and the picture over several runs."""

import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from wanda_lightning import __main__
from wanda_lightning.atomic_files import write_text
from wanda_lightning.cli.compare import main
from wanda_lightning.report.linear_report import LinearReport
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.report.shrinking import Shrinking, ShrinkReport
from wanda_lightning.runs.comparison import Comparison
from wanda_lightning.runs.plotting import plot


def run(folder, method="Wanda(variant=False)", sparsity=0.5, pattern="unstructured", dense=10.0, **stages):
    """Write the report of a run that was evaluated dense, and at the stages given."""
    report = PruningReport(method, pattern, sparsity, calibration={"source": "builtin", "sequence_length": 16})
    report.linears = [LinearReport("q_proj", "layers.0", (10, 10), sparsity, 0.0)]
    report.evaluations = {"dense": {"val/perplexity": dense, "sparsity": 0.0}}
    for stage, perplexity in stages.items():
        report.evaluations[stage.replace("_", "-")] = {"val/perplexity": perplexity, "sparsity": sparsity}
    report.save(folder)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        run(tmp_path / "wanda", pruned=20.0, fine_tuned=15.0),
        run(tmp_path / "wanda-0.7", sparsity=0.7, pruned=90.0),
        run(tmp_path / "sparsegpt", "SparseGPT(block_size=128, damping=0.01)", pruned=18.0),
        run(tmp_path / "2of4", pattern="2:4", pruned=30.0),
    ]


def test_the_shared_dense_evaluation_appears_once(runs):
    header, rows = Comparison(runs).table()
    assert header == ["method", "pattern", "sparsity", "stage", "perplexity"]
    assert rows == [
        ["", "", "0.00%", "dense", "10"],
        ["Wanda", "unstructured", "50.00%", "pruned", "20"],
        ["Wanda", "unstructured", "50.00%", "fine-tuned", "15"],
        ["Wanda", "unstructured", "70.00%", "pruned", "90"],
        ["SparseGPT", "unstructured", "50.00%", "pruned", "18"],
        ["Wanda", "2:4", "50.00%", "pruned", "30"],
    ]


def test_a_folder_of_runs_is_all_of_them(runs, tmp_path):
    (tmp_path / "something_else").mkdir()
    names = [each.folder.name for each in Comparison([tmp_path, runs[0]]).runs]
    assert names == ["2of4", "sparsegpt", "wanda", "wanda-0.7", "wanda"]


def test_the_trials_of_a_search_are_no_runs_of_their_own(tmp_path):
    run(run(tmp_path, pruned=20.0) / "inner", pruned=21.0)
    assert [each.folder for each in Comparison([tmp_path]).runs] == [tmp_path]


def test_dense_evaluations_that_differ_both_appear(tmp_path):
    rows = Comparison([run(tmp_path / "a", pruned=20.0), run(tmp_path / "b", dense=11.0, pruned=21.0)]).rows()
    assert [row["metrics"]["val/perplexity"] for row in rows if row["stage"] == "dense"] == [10, 11]


def test_settings_are_named_where_they_tell_runs_apart(tmp_path):
    comparison = Comparison([run(tmp_path / "a"), run(tmp_path / "b", "Wanda(variant=True)")])
    assert [comparison.label(r) for r in comparison.runs] == ["Wanda", "Wanda(variant=True)"]


def test_folders_are_named_where_settings_do_not_tell_runs_apart(tmp_path):
    comparison = Comparison([run(tmp_path / "a"), run(tmp_path / "b"), run(tmp_path / "c", sparsity=0.6)])
    assert [comparison.label(r) for r in comparison.runs] == ["Wanda in a", "Wanda in b", "Wanda"]


def changed(folder, **parts):
    """Change parts of a run's report."""
    plain = json.loads((folder / "pruning.json").read_text())
    for part, values in parts.items():
        plain[part] |= values
    (folder / "pruning.json").write_text(json.dumps(plain))
    return folder


def test_runs_that_were_evaluated_on_more_text_are_told_apart(tmp_path):
    """Their dense perplexities may agree by chance; what an older version wrote does not tell."""
    runs = [run(tmp_path / name, pruned=20.0) for name in ("old", "few", "many")]
    for folder, tokens in zip(runs[1:], (4088.0, 20440.0), strict=True):
        stage = {"val/perplexity": 10.0, "val/tokens": tokens}
        changed(folder, evaluations={"dense": stage, "pruned": stage})
    comparison = Comparison(runs)
    named = ["Wanda", "Wanda, evaluated tokens 4,088", "Wanda, evaluated tokens 20,440"]
    assert [comparison.label(each) for each in comparison.runs] == named
    differ = "the runs differ in evaluated tokens, so their figures do not compare: 20,440, 4,088"
    assert differ in comparison.notes()
    assert [row[-1] for row in comparison.table()[1] if row[3] == "dense"] == ["", "4,088", "20,440"]


def asked_tasks(folder, stages=("dense", "pruned"), **settings):
    """Add the accuracy on zero-shot tasks to a run, and what lm-eval wrote of them."""
    run(folder, pruned=20.0)
    asked = {"limit": None, "num_fewshot": 0, "max_length": None, "add_special_tokens": False} | settings
    for stage in stages:
        write_text(folder / f"zero_shot/{stage}.json", json.dumps({"settings": asked}))
    stage = {"val/perplexity": 10.0, "val/zero_shot/mean/acc": 0.5}
    return changed(folder, evaluations={"dense": stage, "pruned": stage})


@pytest.mark.parametrize(("name", "values"), [("limit", (10, 20)), ("num_fewshot", (0, 5)), ("limit", (0.5, None))])
def test_runs_that_were_asked_tasks_in_another_way_are_told_apart(tmp_path, name, values):
    runs = [asked_tasks(tmp_path / str(value), **{name: value}) for value in values]
    differ = f"the runs differ in zero-shot {name}, so their figures do not compare: {values[0]}, {values[1]}"
    assert Comparison(runs).notes() == [differ]


def test_tasks_of_an_earlier_run_in_the_folder_do_not_count(tmp_path):
    runs = [asked_tasks(tmp_path / "a", limit=10), run(tmp_path / "b", pruned=20.0)]
    asked_tasks(runs[1], limit=20)
    run(runs[1], pruned=20.0)
    assert Comparison(runs).notes() == []


def test_stages_that_were_asked_in_another_way_are_told(tmp_path):
    runs = [asked_tasks(tmp_path / "a", limit=10), asked_tasks(tmp_path / "b", limit=10)]
    asked_tasks(runs[1], ["pruned"], limit=20)
    assert "10, 10 and 20" in Comparison(runs).notes()[0]


def test_runs_of_other_models_or_with_other_data_are_told_apart(tmp_path):
    """In the table, in the picture, and each with its own dense level."""
    runs = [run(tmp_path / name, pruned=20.0) for name in ("a", "b", "c")]
    runs.append(run(tmp_path / "d", "Magnitude()", pruned=50.0))
    changed(runs[0], model={"name": "org/small", "parameters": 10})
    for folder in runs[1:]:
        changed(folder, model={"name": "/models/large", "parameters": 30}, calibration={"source": "data/my.txt"})
    changed(runs[2], calibration={"sequence_length": 32})
    comparison = Comparison(runs)
    assert [comparison.label(each) for each in comparison.runs] == [
        "Wanda, small, sequence_length 16, source builtin",
        "Wanda, large, sequence_length 16, source my.txt",
        "Wanda, large, sequence_length 32, source my.txt",
        "Magnitude, large, sequence_length 16, source my.txt",
    ]
    assert sum(row["stage"] == "dense" for row in comparison.rows()) == 3
    different = "/models/large, 30 parameters; org/small, 10 parameters"
    assert comparison.notes()[0] == f"the runs are of different models, so their figures do not compare: {different}"
    plot(comparison, tmp_path / "p.svg")
    legend = ElementTree.parse(tmp_path / "p.svg").find(".//{*}g[@id='legend_1']")
    assert len([group for group in legend if group.get("id", "").startswith("text")]) == 7


@pytest.mark.parametrize("source", ["my.txt", "a_text_whose_name_is_longer_than_a_legend_is_wide.txt"])
def test_long_names_stand_below_the_picture(runs, tmp_path, source):
    """The legend is a part of the axes, which it would cover, or stands beside them."""
    changed(runs[1], calibration={"source": source})
    plot(Comparison(runs), tmp_path / "p.svg")
    axes = ElementTree.parse(tmp_path / "p.svg").find(".//{*}g[@id='axes_1']")
    assert (axes.find("{*}g[@id='legend_1']") is None) == (len(source) > 10)


def test_standard_errors_stand_beside_their_metrics(tmp_path):
    folder = run(tmp_path)
    report = PruningReport.from_dict(json.loads((folder / "pruning.json").read_text()))
    report.evaluations["dense"] |= {"val/zero_shot/t/acc": 0.41, "val/zero_shot/t/acc_stderr": 0.0234}
    report.save(folder)
    header, rows = Comparison([folder]).table()
    assert header[-1] == "zero_shot/t/acc"
    assert rows[0][-1] == "0.41 ± 0.023"


@pytest.mark.parametrize(("also", "rows"), [({}, 1), ({"val/perplexity": 1.0}, 2)])
def test_the_dense_model_is_one_row_where_runs_have_other_metrics(runs, also, rows):
    comparison = Comparison(runs[:3])
    comparison.runs[1].evaluations["dense"] |= {"acc": 0.4, **also}
    dense = [row["metrics"] for row in comparison.rows() if row["stage"] == "dense"]
    assert len(dense) == rows
    assert dense[-1]["acc"] == 0.4


def test_printed_it_is_its_table(runs):
    assert str(Comparison(runs)) == Comparison(runs).to_markdown()


def test_nothing_is_no_comparison():
    with pytest.raises(ValueError, match="nothing to compare: name the folders of one or more runs"):
        Comparison([])


def test_figures_that_do_not_compare_are_noted(runs):
    file = runs[0] / "pruning.json"
    plain = json.loads(file.read_text())
    plain["calibration"]["sequence_length"] = 32
    file.write_text(json.dumps(plain))
    assert "differ in sequence_length, so their figures do not compare: 16, 32" in Comparison(runs).to_markdown()


def test_notes_on_the_terminal_are_no_markup(tmp_path):
    comparison = Comparison([run(tmp_path / name) for name in "ab"])
    comparison.runs[0].data["source"] = "[my]text.txt"
    console = Console(width=200, record=True, file=StringIO())
    console.print(comparison.to_table())
    assert f"Note: {comparison.notes()[0]}." in console.export_text()


def test_markdown_and_json_hold_the_same(runs, tmp_path):
    Comparison(runs).save(tmp_path / "out")
    lines = (tmp_path / "out/comparison.md").read_text().splitlines()
    rows = json.loads((tmp_path / "out/comparison.json").read_text())["rows"]
    assert [line.split(" | ")[-1].rstrip(" |") for line in lines[2:]] == [
        f"{row['metrics']['val/perplexity']:g}" for row in rows
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is no finished run"), ("{", "is no report of a pruning"), ("{}", "is no report.*method")],
)
def test_what_is_no_run_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "pruning.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Comparison([tmp_path])


@pytest.mark.parametrize("one", ["results/wanda", Path("results/wanda")])
def test_one_folder_is_no_list(one):
    with pytest.raises(ValueError, match="folders must be a list, got "):
        Comparison(one)


def test_the_picture_has_every_point(runs, tmp_path):
    plot(Comparison(runs), tmp_path / "p.svg")
    plot(Comparison(runs), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    namespace = {"svg": "http://www.w3.org/2000/svg"}
    picture = ElementTree.parse(tmp_path / "p.svg")
    axes = picture.find(".//svg:g[@id='axes_1']", namespace)
    lines = [group for group in axes if group.get("id", "").startswith("line2d")]
    points = [len(line.findall(".//svg:use", namespace)) for line in lines]
    assert sorted(points) == [0, 1, 1, 1, 2]  # the dense level; SparseGPT, fine-tuned, 2:4; Wanda at 0.5 and 0.7
    assert {path.name for path in tmp_path.glob("p.*")} == {"p.svg", "p.png"}


def test_a_dense_level_that_runs_share_is_drawn_once(tmp_path):
    """Also where one of them was evaluated on tasks besides."""
    folders = [run(tmp_path / name, pruned=20.0) for name in "ab"]
    report = json.loads((folders[0] / "pruning.json").read_text())
    report["evaluations"]["dense"]["val/zero_shot/mean/acc"] = 0.4
    (folders[0] / "pruning.json").write_text(json.dumps(report))
    plot(Comparison(folders), tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().count("<!-- dense -->") == 1


def test_no_point_is_outside_of_the_picture(tmp_path):
    """Nor is the largest, where it is that of a pattern, drawn a little beside its place."""
    runs = [run(tmp_path / "a", pruned=20.0), run(tmp_path / "b", pattern="2:4", pruned=9000.0)]
    plot(Comparison(runs), tmp_path / "p.svg")
    axes = ElementTree.parse(tmp_path / "p.svg").find(".//{*}g[@id='axes_1']")
    numbers = map(float, re.findall(r"-?[\d.]+", axes.find(".//{*}g[@id='patch_2']/{*}path").get("d")))
    corners = list(zip(numbers, numbers, strict=True))
    points = [use for group in axes if group.get("id", "").startswith("line2d") for use in group.findall(".//{*}use")]
    places = [(float(use.get("x")), float(use.get("y"))) for use in points]
    assert len(places) == 2
    assert places[0][0] == pytest.approx(places[1][0])  # both have 50 %
    for x, y in places:
        assert min(c[0] for c in corners) < x < max(c[0] for c in corners)
        assert min(c[1] for c in corners) < y < max(c[1] for c in corners)


def test_folders_of_one_name_are_told_apart_by_their_places(tmp_path):
    comparison = Comparison([run(tmp_path / place / "wanda", pruned=20.0) for place in "ab"])
    assert [comparison.label(r) for r in comparison.runs] == [
        f"Wanda in {tmp_path / place / 'wanda'}" for place in "ab"
    ]


def test_the_folder_one_is_in_has_a_name(tmp_path, monkeypatch):
    other = run(tmp_path / "b", pruned=20.0)
    monkeypatch.chdir(run(tmp_path / "a", pruned=20.0))
    comparison = Comparison([".", other])
    assert [comparison.label(r) for r in comparison.runs] == ["Wanda in a", "Wanda in b"]


@pytest.mark.parametrize("perplexity", [math.inf, math.nan])
def test_what_is_not_finite_is_counted_beside_the_picture(tmp_path, perplexity):
    runs = [run(tmp_path / "a", pruned=20.0), run(tmp_path / "b", sparsity=0.7, pruned=perplexity)]
    plot(Comparison(runs), tmp_path / "p.svg")
    assert "<!-- (1 of 3 are not finite) -->" in (tmp_path / "p.svg").read_text()


def test_a_picture_without_a_finite_value_is_empty(tmp_path):
    plot(Comparison([run(tmp_path / "a", dense=math.inf, pruned=math.nan)]), tmp_path / "p.svg")
    assert "<!-- (2 of 2 are not finite) -->" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize(
    ("file", "metric", "message"),
    [("p.pdf", None, r"one of \.png, \.svg, got .*p\.pdf"), ("p.png", "acc", "no run has the metric 'acc'; they have")],
)
def test_a_picture_that_cannot_be_drawn(runs, tmp_path, file, metric, message):
    with pytest.raises(ValueError, match=message):
        plot(Comparison(runs), tmp_path / file, metric)
    assert not (tmp_path / file).exists()


def test_without_matplotlib_the_error_names_the_extra(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "wanda-lightning\[plot\]"'):
        plot(Comparison(runs), tmp_path / "p.png")


def test_the_command(runs, tmp_path, capsys):
    main([*map(str, runs), "--output", str(tmp_path / "out"), "--plot", str(tmp_path / "out/p.svg")])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"comparison.md", "comparison.json", "p.svg"}
    assert "SparseGPT" in capsys.readouterr().out


@pytest.mark.parametrize("metric", ["perplexity", "val/perplexity"])
def test_a_metric_is_drawn_by_the_name_that_the_table_has(runs, tmp_path, metric):
    main([str(runs[0]), "--plot", str(tmp_path / "p.svg"), "--metric", metric])
    assert (tmp_path / "p.svg").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "x.foo"], r"must be one of \.png, \.svg"),
        (["--plot", "x.png", "--metric", "plexity"], "no run has the metric 'plexity'; they have val/perplexity"),
        (["--plot", "x.png", "--metric", "foo"], "no run has the metric 'foo'; they have val/perplexity"),
        (["--metric", "val/perplexity"], "--metric says what --plot draws"),
    ],
)
def test_the_command_draws_or_does_nothing(runs, tmp_path, capsys, options, message):
    with pytest.raises(ValueError, match=message):
        main([*map(str, runs), "--output", str(tmp_path / "out"), *options])
    assert (capsys.readouterr().out, (tmp_path / "out").exists()) == ("", False)


def test_the_commands_errors_are_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wanda-lightning", "compare", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2
    assert re.match(r"wanda-lightning: error: .* is no finished run", capsys.readouterr().err)


def test_runs_that_made_a_model_smaller_have_a_row_too(tmp_path):
    step = ShrinkReport("neurons", {"keep": 0.8}, {"intermediate_size": (64, 48)}, (1000, 800), (4000, 3200))
    stages = {"dense": {"val/perplexity": 10.0}, "smaller": {"val/perplexity": 20.0}}
    Shrinking([step], {"name": "some", "parameters": 800}, stages).save(tmp_path / "small")
    comparison = Comparison([tmp_path / "small"])
    assert [row["stage"] for row in comparison.rows()] == ["dense", "smaller"]
    assert comparison.rows()[1]["method"] == "intermediate_size 64 -> 48"
    assert comparison.models() == ["some, 1,000 parameters"]
