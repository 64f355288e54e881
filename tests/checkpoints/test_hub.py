"""Pushing to the model hub, with the client's own signatures and no hub."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import pytest
from helpers import SomebodysData, SomebodysModule, trainer
from huggingface_hub import HfApi, RepoUrl, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

from wanda_lightning import PruningTrainer, WandaPruning
from wanda_lightning.__main__ import main
from wanda_lightning.checkpoints.hub import OF_THE_MODEL, check_can_push

NAME = "me/sparse-llama"


@pytest.fixture
def hub(monkeypatch):
    """A client that refuses arguments which the real one does not take, remembers calls, and sends nothing."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = RepoUrl(f"{constants.ENDPOINT}/{NAME}")
    api.files = []
    api.upload_folder.side_effect = lambda **sent: api.files.extend(
        sorted(file.name for file in sent["folder_path"].iterdir())
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return api


def pushing(folder, *callbacks):
    return trainer(folder, *callbacks, cls=PruningTrainer, push_to_hub=NAME)


def test_the_saved_folder_is_pushed_with_its_card(hub, tmp_path):
    run = pushing(tmp_path, WandaPruning())
    hub.whoami.assert_called_once_with()
    report = run.prune(SomebodysModule(), SomebodysData())
    hub.create_repo.assert_called_once_with(NAME, exist_ok=True)
    sent = hub.upload_folder.call_args.kwargs
    assert sent["repo_id"] == NAME
    assert sent["folder_path"] == tmp_path / "model"
    assert sent["delete_patterns"] == OF_THE_MODEL
    assert {"README.md", "config.json", "model.safetensors"} <= {*hub.files}  # they were there when it was pushed
    assert f"# {report.title}" in (tmp_path / "model/README.md").read_text()
    assert (run.hub_url, run.push_failed) == (f"{constants.ENDPOINT}/{NAME}", False)


def test_weights_of_an_earlier_model_go():
    """They would be loaded in place of the new ones: transformers prefers one file to several."""
    there = [
        "README.md", "adapter_model.safetensors", "config.json", "model.safetensors", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "notes.txt",
    ]  # fmt: skip
    kept = {"README.md", "adapter_model.safetensors", "config.json", "notes.txt"}
    assert {*there} - {*filter_repo_objects(there, allow_patterns=OF_THE_MODEL)} == kept


def test_nothing_is_pushed_unless_asked(hub, tmp_path):
    trainer(tmp_path, WandaPruning(), cls=PruningTrainer).prune(SomebodysModule(), SomebodysData())
    assert hub.mock_calls == []


def test_a_model_without_pruning_is_pushed_too(hub, tmp_path):
    run = pushing(tmp_path)
    run.fit(module := SomebodysModule(), SomebodysData())
    run.save_pretrained(module)
    assert "model.safetensors" in hub.files


def test_a_push_that_fails_loses_nothing(hub, tmp_path, caplog):
    hub.upload_folder.side_effect = TimeoutError("the hub is\nbusy")
    run = pushing(tmp_path, WandaPruning())
    for _ in range(2):  # the second time the results of the first are there, and are kept until the end
        run.prune(SomebodysModule(), SomebodysData())
        assert run.push_failed
        assert {"model", "pruning.json", "report.html"} <= {file.name for file in tmp_path.iterdir()}
        assert not (tmp_path / "unfinished").exists()
    model = tmp_path / "model"
    assert f"not pushed (the hub is busy). To push it: hf upload {NAME} {model} ." in caplog.text


def test_results_are_on_disk_before_the_push_begins(hub, tmp_path):
    trainer(tmp_path, WandaPruning(), cls=PruningTrainer).prune(SomebodysModule(), SomebodysData())
    earlier = json.loads((tmp_path / "pruning.json").read_text())["environment"]["date"]
    dates = []
    hub.upload_folder.side_effect = lambda **_: dates.append(
        json.loads((tmp_path / "pruning.json").read_text())["environment"]["date"]
    )
    callback = WandaPruning()
    pushing(tmp_path, callback).prune(SomebodysModule(), SomebodysData())
    assert dates == [callback.report.environment["date"]]
    assert earlier <= dates[0]


@pytest.mark.parametrize("name", ["", "a/b/c", "me/my model", "me/.git"])
def test_what_is_no_name_is_refused(hub, name):
    with pytest.raises(ValueError, match="push_to_hub must be a name such as me/my-model, got"):
        PruningTrainer(push_to_hub=name, logger=False)
    assert hub.mock_calls == []


def test_without_a_token_it_is_refused(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        PruningTrainer(push_to_hub=NAME, logger=False)


def test_offline_it_is_refused(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        check_can_push(NAME)


def test_a_token_that_the_hub_does_not_take(hub):
    response = SimpleNamespace(status_code=401, headers={}, request=None)
    hub.whoami.side_effect = HfHubHTTPError("Invalid user token.", response=response)
    with pytest.raises(ValueError, match=r"does not take the token \(Invalid user token"):
        check_can_push(NAME)


def test_a_hub_that_cannot_be_reached(hub):
    hub.whoami.side_effect = RuntimeError("no route")
    with pytest.raises(ConnectionError, match=r"cannot be reached \(no route\)"):
        check_can_push(NAME)


@pytest.mark.parametrize("fails", [False, True])
def test_on_the_command_line(fails, hub, tiny_model_folder, tmp_path, monkeypatch, capsys):
    if fails:
        hub.upload_folder.side_effect = TimeoutError("busy")
    monkeypatch.chdir(tmp_path)
    small = ["--num_samples=4", "--sequence_length=16", "--data.max_evaluation_windows=2", "--trainer.accelerator=cpu"]
    asked = ["prune", str(tiny_model_folder), "--output=out", f"--push_to_hub={NAME}", *small]
    monkeypatch.setattr(sys, "argv", ["wanda-lightning", *asked])
    if fails:
        with pytest.raises(SystemExit, match="1"):
            main()
    else:
        main()
    said = capsys.readouterr().out
    assert (f"The model is at {constants.ENDPOINT}/{NAME}" in said) != fails
    assert "Results are in" in said
    assert {"model", "report.html", "config.yaml"} <= {file.name for file in (tmp_path / "out").iterdir()}
