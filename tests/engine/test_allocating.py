"""An allocator decides once for a run, and for matrices that linears share."""

import json

import pytest
import torch
from helpers import tiny_llama, token_batches

from wanda_lightning.allocation.atp import ATP
from wanda_lightning.allocation.least_loss import LeastLoss
from wanda_lightning.allocation.owl import OWL
from wanda_lightning.allocation.selection import Selection
from wanda_lightning.calibration.feed import LanguageModelFeed
from wanda_lightning.engine.allocating import allocated
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.engine.settings import PruningSettings
from wanda_lightning.engine.stacks import Found
from wanda_lightning.methods import Magnitude
from wanda_lightning.sparsity import Unstructured


def cut_off(layers, _):
    """Let a run end behind its first layer."""
    for number, layer in enumerate(layers):
        if number:
            raise KeyboardInterrupt
        yield layer


@pytest.mark.parametrize("allocation", [OWL(), ATP(), LeastLoss(rounds=1, step=0.125)], ids=str)
def test_a_run_that_goes_on_keeps_what_was_decided(tmp_path, monkeypatch, allocation):
    def run(folder, **settings):
        model, journal = tiny_llama(), Journal(folder)
        try:
            report = prune_model(
                model, token_batches(), "wanda", 0.5, allocation=allocation, journal=journal, **settings
            )
        finally:
            journal.release()
        return model, report

    whole, report = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=cut_off)
    kept = json.loads((tmp_path / "run/allocation.json").read_text())
    assert kept["patterns"] == report.allocation.patterns
    monkeypatch.setattr(type(allocation), "allocate", lambda *_: pytest.fail("it is decided already"))
    model, again = run(tmp_path / "run")
    assert again.allocation == report.allocation
    assert all(map(torch.equal, model.parameters(), whole.parameters()))
    assert [row.sparsity for row in again.linears] == [row.sparsity for row in report.linears]


@pytest.mark.parametrize("left", ["", "[1]", "{}", '{"allocator": "OWL'])
def test_it_is_decided_anew_where_the_file_is_damaged(tmp_path, caplog, left):
    def run(**settings):
        model, journal = tiny_llama(), Journal(tmp_path / "run")
        try:
            prune_model(model, token_batches(), "wanda", 0.5, allocation=OWL(), journal=journal, **settings)
        finally:
            journal.release()
        return model

    with pytest.raises(KeyboardInterrupt):
        run(progress=cut_off)
    file = tmp_path / "run/allocation.json"
    decided = file.read_text()
    file.write_text(left)
    model, whole = run(), tiny_llama()
    prune_model(whole, token_batches(), "wanda", 0.5, allocation=OWL())
    assert all(map(torch.equal, model.parameters(), whole.parameters()))
    assert file.read_text() == decided
    assert "allocation.json is damaged" in caplog.text


def test_what_was_decided_for_another_run_is_not_taken_up(tmp_path):
    (tmp_path / "allocation.json").write_text("{}")
    journal = Journal(tmp_path)
    report = prune_model(tiny_llama(), token_batches(), "wanda", 0.5, allocation=ATP(0.1), journal=journal)
    journal.release()
    assert json.loads((tmp_path / "allocation.json").read_text())["patterns"] == report.allocation.patterns


@pytest.mark.parametrize("allocation", [OWL(), LeastLoss(rounds=1)], ids=str)
def test_a_matrix_that_linears_share_is_decided_on_once(allocation):
    model = tiny_llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    report = prune_model(model, token_batches(), "wanda", 0.5, allocation=allocation)
    patterns = report.allocation.patterns
    assert patterns["model.layers.2.mlp.up_proj"] == patterns["model.layers.0.mlp.up_proj"]
    rows = {row.name: row.sparsity for row in report.linears}
    assert rows["model.layers.2.mlp.up_proj"] == rows["model.layers.0.mlp.up_proj"] > 0


def test_a_model_is_left_as_dense_as_it_was_where_the_split_fails(monkeypatch):
    from wanda_lightning.allocation import least_loss

    def fails(*_, **__):
        raise ValueError("no choice reaches a total")

    monkeypatch.setattr(least_loss, "cheapest_split", fails)
    model = tiny_llama()
    with pytest.raises(ValueError, match="no choice"):
        prune_model(model, token_batches(), "wanda", 0.5, allocation=LeastLoss())
    assert all(map(torch.equal, model.parameters(), tiny_llama().parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_processes_hear_of_a_decision_that_cannot_be_read(tmp_path, told):
    (tmp_path / "allocation.json").mkdir()
    model = tiny_llama()
    asked = PruningSettings(method=Magnitude(), pattern=Unstructured(0.5), selection=Selection(allocation=OWL()))
    plan = Plan.of(model, asked, Found(None, asked.selection))
    with pytest.raises(OSError):
        allocated(plan, LanguageModelFeed(model), [], "device", Journal(tmp_path), Processes())
    assert isinstance(told[-1], OSError)
