"""Packaged recipes, by name and from any folder."""

import sys

import pytest
import yaml
from jsonargparse import capture_parser

from wanda_lightning import __main__
from wanda_lightning.cli.lightning_cli import run
from wanda_lightning.cli.recipes import FOLDER, find, main


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_has_every_recipe_and_what_it_does(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(file.stem for file in FOLDER.glob("*.yaml"))
    assert all(line.split(maxsplit=1)[1] in (FOLDER / f"{line.split()[0]}.yaml").read_text() for line in lines)


@pytest.mark.parametrize("name", ["wanda", "wanda.yaml", "recipes/wanda.yaml", "recipes/wanda"])
def test_names_are_found_from_any_folder(elsewhere, name):
    assert find(name) == FOLDER / "wanda.yaml"


def test_files_come_first(elsewhere):
    (elsewhere / "wanda.yaml").write_text("mine: 1")
    assert find("wanda.yaml").read_text() == "mine: 1"
    assert find("wanda") == FOLDER / "wanda.yaml"


@pytest.mark.parametrize("name", ["no_such", "other/wanda.yaml", "../wanda.yaml", ""])
def test_what_is_not_there_is_named_with_what_is(elsewhere, name):
    with pytest.raises(ValueError, match=r"there is no file .*recipes of the package are ablate, .*wanda_2of4"):
        find(name)


def test_a_name_is_a_name_after_c_only(elsewhere, tiny_model_folder):
    """As a text file of that name, ``wanda`` is the user's own."""
    parser = capture_parser(lambda: run(["prune"]))
    more = [f"--model.pretrained={tiny_model_folder}", "--data.source", "wanda"]
    for option in (["-c", "wanda"], ["--config=wanda"], ["--config", "recipes/wanda.yaml"]):
        config = parser.parse_args(["prune", *option, *more]).prune
        assert config.trainer.callbacks[0].class_path == "wanda_lightning.WandaPruning"
        assert config.data.init_args.source == "wanda"


def test_settings_instead_of_a_name(elsewhere, tiny_model_folder):
    parser = capture_parser(lambda: run(["prune"]))
    model = f"--model.pretrained={tiny_model_folder}"
    config = parser.parse_args(["prune", "-c", "wanda", "-c", "{trainer: {max_steps: 3}}", model]).prune
    assert config.trainer.max_steps == 3
    assert config.trainer.callbacks[0].class_path == "wanda_lightning.WandaPruning"


def test_show_prints_the_file(capsys):
    main(["show", "wanda_2of4"])
    assert capsys.readouterr().out == (FOLDER / "wanda_2of4.yaml").read_text()


def test_copies_are_yours_and_never_overwritten(elsewhere):
    main(["copy", "wanda"])
    main(["copy", "wanda", "mine.yaml"])
    assert (elsewhere / "wanda.yaml").read_bytes() == (elsewhere / "mine.yaml").read_bytes()
    assert yaml.safe_load((elsewhere / "mine.yaml").read_text())["trainer"]["callbacks"]
    (elsewhere / "mine.yaml").write_text("changed: 1")
    with pytest.raises(ValueError, match=r"mine\.yaml exists already"):
        main(["copy", "wanda", "mine.yaml"])
    assert (elsewhere / "mine.yaml").read_text() == "changed: 1"


def test_a_run_by_name(elsewhere, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", [
        "wanda-lightning", "prune", "-c", "wanda", f"--model.pretrained={tiny_model_folder}", "--data.num_samples=4",
        "--data.sequence_length=16", "--data.max_evaluation_windows=4", "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    __main__.main()
    assert (elsewhere / "results/wanda/pruning.json").exists()


def test_a_recipe_that_is_not_there_is_one_short_message(elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wanda-lightning", "prune", "-c", "wonda"])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("wanda-lightning: error: there is no file 'wonda'")


@pytest.mark.parametrize("action", ["show", "copy"])
def test_which_recipe_is_asked(action):
    with pytest.raises(ValueError, match=f"which recipe.*recipes {action} NAME"):
        main([action])


def test_an_action_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sho", "wanda"])
    assert stop.value.code == 2
    assert "one of list, show, copy, got 'sho'" in capsys.readouterr().err
