"""Several processes with a part of the calibration set each end with the model that one process makes of all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared_pruning
import torch

from wanda_lightning.engine.processes import Processes, balanced


@pytest.fixture(scope="module", params=[2, 4])
def of_many(request, tmp_path_factory):
    """What every rank found."""
    folder = tmp_path_factory.mktemp("processes")
    subprocess.run(
        [sys.executable, shared_pruning.__file__, str(request.param), str(folder)],
        check=True,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"},
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.fixture(scope="module")
def of_one():
    """What one process makes of all batches."""
    runs = [(model, name) for model in shared_pruning.MODELS for name in shared_pruning.RUNS]
    return {run: shared_pruning.prune(Processes.alone(), *run) for run in runs}


def test_all_processes_end_with_the_same_bytes(of_many):
    first, *others = of_many
    for other in others:
        for run in first.keys() - {"refused"}:
            weights, rows = first[run]
            assert all(torch.equal(other[run][0][name], weight) for name, weight in weights.items()), run
            assert other[run][1] == rows


def test_many_processes_give_what_one_gives(of_many, of_one):
    for run, (weights, rows) in of_one.items():
        found_weights, found_rows = of_many[0][run]
        assert [row[:3] for row in found_rows] == [row[:3] for row in rows], run
        for name, weight in weights.items():
            # A sum in another order may break a tie the other way.
            assert ((found_weights[name] != 0) == (weight != 0)).float().mean() > 0.999, (run, name)
            kept = (found_weights[name] != 0) & (weight != 0)
            torch.testing.assert_close(found_weights[name][kept], weight[kept], rtol=1e-5, atol=1e-5, msg=str(run))


@pytest.mark.parametrize("model", shared_pruning.MODELS)
def test_a_step_of_many_is_one_with_all_their_batches(of_many, model):
    weights, errors = of_many[0][model, "reconstruction"]
    alone, wanted = shared_pruning.reconstruct(Processes.alone(), model, len(of_many))
    assert all(after < before for before, after in errors[:1])
    for found, of_one in zip(errors, wanted, strict=True):
        assert found == pytest.approx(of_one, rel=1e-4)
    for name, weight in alone.items():
        # Where a gradient is nearly zero, Adam's step is as large as elsewhere and its sign is that of the rounding.
        assert ((weights[name] - weight).abs() < 1e-4).float().mean() > 0.998, name


def test_all_processes_aim_at_the_dense_model_together(of_many):
    weights, alphas = of_many[0]["aimed"]
    alone, wanted = shared_pruning.aimed(Processes.alone(), len(of_many))
    assert alphas == pytest.approx(wanted, abs=1e-3)
    assert max(alphas) > 0.1
    for name, weight in alone.items():
        assert ((weights[name] - weight).abs() < 1e-3).float().mean() > 0.998, name  # a tie may break the other way


def test_a_recorded_layer_is_restored_in_all_processes(of_many):
    for found in of_many:
        (recorded, rows), (restored, again) = found["recorded"], found["restored"]
        assert all(torch.equal(restored[name], weight) for name, weight in recorded.items())
        assert again == rows


def test_processes_that_reach_linears_in_different_orders_take_two_passes(of_many):
    if len(of_many) == 2:
        weights, order = shared_pruning.forked(Processes.alone())
        assert order == "two passes"
        for found in of_many:
            assert found["forked"][1] == order
            differ = sum((found["forked"][0][name] != weight).sum().item() for name, weight in weights.items())
            assert differ <= 4  # a sum in another order may break a tie the other way


def test_what_one_process_refuses_all_refuse(of_many):
    for found in of_many:
        assert "the calibration set is empty" in found["refused"]
        assert "model.layers.0.self_attn.q_proj are NaN or infinite" in found["refused"]


def test_all_processes_raise_the_same_kind_of_error(monkeypatch):
    processes = Processes.alone()
    processes.size = 2
    monkeypatch.setattr(processes, "gather", lambda mine: [KeyError("of the first"), mine])
    with pytest.raises(KeyError, match="of the first"), processes.together():
        raise OSError("of this one")


def test_other_processes_hear_of_a_first_step_that_cannot_be_taken(told):
    with pytest.raises(ZeroDivisionError):
        Processes().first_together(1 / number for number in (0, 1))
    assert [type(error) for error in told] == [ZeroDivisionError]


def test_work_is_balanced():
    assert balanced([1, 8, 2, 2, 3], 2) == [1, 0, 1, 1, 1]
    assert balanced([5.0], 4) == [0]
