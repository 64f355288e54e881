"""The weight that is aimed at, against a ridge regression on the tokens themselves, in float64."""

import pytest
import torch
from least_squares import random

from wanda_lightning.calibration.input_drift import InputDrift
from wanda_lightning.statistics import InputHessian

TOKENS, HELD_OUT, IN, OUT = 200, 40, 12, 5


def ridge(x, wanted):
    """Solve min ||x D - wanted||^2 + sum_j damping_j ||D_j||^2 as least squares with more rows.

    Each input is damped by 0.01 of the mean energy of all, and 0.3 of its own.
    """
    root_I = (0.01 * x.square().sum() / IN + 0.3 * x.square().sum(0)).sqrt()
    return torch.linalg.lstsq(torch.cat([x, root_I.diag()]), torch.cat([wanted, wanted.new_zeros(IN, OUT)]))[0]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tokens():
    """Inputs in the dense and in the pruned model, residual streams there, and a weight."""
    x = random(TOKENS, IN, seed=1)
    pruned = x + 0.4 * random(TOKENS, IN, seed=2) + 0.3 * x @ random(IN, IN, seed=3) / IN**0.5
    r = random(TOKENS, OUT, seed=4)
    return x, pruned, r, r + 0.2 * pruned[:, :OUT] + 0.5 * random(TOKENS, OUT, seed=5), random(OUT, IN, seed=6)


def drift_of(x, pruned, lost=None, parts=((0, TOKENS - HELD_OUT), (TOKENS - HELD_OUT, TOKENS))):
    """Add tokens up, and what a linear that writes to the stream lacks, where that is given."""
    drift, gap = InputDrift(IN, dtype=torch.float64), x - pruned if lost is None else lost
    for start, stop in parts:
        some = slice(start, stop)
        drift.update_with_dense(pruned[some], gap[some], None if lost is None else "o", start >= TOKENS - HELD_OUT)
    return drift


@pytest.mark.parametrize("writes_to_the_stream", [False, True])
def test_it_is_a_ridge_regression_and_alpha_is_best_on_what_was_held_out(tokens, writes_to_the_stream):
    x, pruned, r, pruned_r, weight = tokens
    x[-HELD_OUT:], r[-HELD_OUT:] = (x + pruned)[-HELD_OUT:] / 2, (r + pruned_r)[-HELD_OUT:] / 2  # half of it is lost
    wanted = x @ weight.t() - pruned @ weight.t() + (r - pruned_r if writes_to_the_stream else 0)
    train, held_out = slice(0, TOKENS - HELD_OUT), slice(TOKENS - HELD_OUT, TOKENS)
    target, alpha = drift_of(x, pruned, wanted if writes_to_the_stream else None).target("o", weight)

    def error(alpha, fit):
        return (pruned[held_out] @ (alpha * fit) - wanted[held_out]).square().sum()

    some = ridge(pruned[train], wanted[train])
    grid = torch.linspace(0, 1, 10001)
    errors = torch.stack([error(a, some) for a in grid])
    assert 0.1 < alpha < 1
    assert alpha == pytest.approx(float(grid[errors.argmin()]), abs=1e-4)
    torch.testing.assert_close(target, weight + alpha * ridge(pruned, wanted).t())


def test_inputs_and_outputs_say_the_same(tokens):
    x, pruned, *_, weight = tokens
    target, alpha = drift_of(x, pruned).target("o", weight)
    other, same_alpha = drift_of(x, pruned, (x - pruned) @ weight.t()).target("o", weight)
    torch.testing.assert_close(other, target)
    assert same_alpha == pytest.approx(alpha)


def test_what_one_linear_writes_serves_no_other(tokens):
    x, pruned, *_, weight = tokens
    assert drift_of(x, pruned, (x - pruned) @ weight.t()).target("q", weight) is None


def test_batches_may_come_in_any_parts(tokens, monkeypatch):
    x, pruned, *_, weight = tokens
    target, _ = drift_of(x, pruned).target("o", weight)
    monkeypatch.setattr(InputDrift, "chunk", 7)
    parts = [(0, 30), (160, 170), (30, 160), (170, TOKENS)]
    torch.testing.assert_close(drift_of(x, pruned, parts=parts).target("o", weight)[0], target)


def test_the_scale_of_the_inputs_does_not_matter(tokens):
    x, pruned, *_, weight = tokens
    target, alpha = drift_of(x, pruned).target("o", weight)
    same, again = drift_of(1e-6 * x, 1e-6 * pruned).target("o", weight)
    assert 0.1 < again == pytest.approx(alpha)
    torch.testing.assert_close(same, target)


def test_same_inputs_change_nothing(tokens):
    x, _, _, _, weight = tokens
    for lost in (None, torch.zeros(TOKENS, OUT)):
        target, alpha = drift_of(x, x, lost).target("o", weight)
        assert torch.equal(target, weight)
        assert alpha == 0


def test_what_does_not_help_on_held_out_tokens_is_left_out(tokens):
    x, pruned, *_, weight = tokens
    x[-HELD_OUT:] = 2 * pruned[-HELD_OUT:] - x[-HELD_OUT:]  # there the error has the other sign
    target, alpha = drift_of(x, pruned).target("o", weight)
    assert alpha == 0
    assert torch.equal(target, weight)


def test_it_goes_no_further_than_the_whole_way(tokens):
    x, pruned, *_, weight = tokens
    x[-HELD_OUT:] = 3 * x[-HELD_OUT:] - 2 * pruned[-HELD_OUT:]  # there three times as much is lost
    target, alpha = drift_of(x, pruned).target("o", weight)
    assert alpha == 1
    torch.testing.assert_close(target, weight + ridge(pruned, (x - pruned) @ weight.t()).t())


def test_an_input_that_is_always_zero_gets_no_weight(tokens):
    x, pruned, *_, weight = tokens
    x[:, 3], pruned[:, 3] = 0, 0
    target, alpha = drift_of(x, pruned).target("o", weight)
    assert alpha > 0
    assert torch.equal(target[:, 3], weight[:, 3])


def test_it_is_a_hessian_for_methods(tokens):
    x, pruned, *_ = tokens
    drift, hessian = drift_of(x, pruned), InputHessian(IN, dtype=torch.float64)
    hessian.update(pruned)
    torch.testing.assert_close(drift.compute(), hessian.compute())
    assert drift.tokens == TOKENS
    assert InputDrift(IN).target("q", torch.ones(OUT, IN)) is None
