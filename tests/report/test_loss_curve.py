"""The loss of a training after the pruning."""

from itertools import pairwise

import pytest
import torch
from helpers import SomebodysData, SomebodysModule, trainer

from wanda_lightning import PruningReport, WandaPruning
from wanda_lightning.report.html.page import to_html
from wanda_lightning.report.loss_curve import MOST, add_point, averaged


def curve_of(steps: int) -> list[tuple[int, float]]:
    curve = []
    for step in range(1, steps + 1):
        add_point(curve, step, float(step) ** 2)
    return curve


@pytest.mark.parametrize("steps", [1, 2, MOST - 1, MOST, MOST + 1, 20_000])
def test_points_are_evenly_spaced_and_few(steps):
    curve = curve_of(steps)
    assert len(curve) < MOST
    assert all(loss == step**2 for step, loss in curve)
    gaps = {after[0] - before[0] for before, after in pairwise(curve)}
    assert len(gaps) <= 1
    assert curve[0][0] == 1
    assert steps - curve[-1][0] < (gaps or {1}).pop()


def test_steps_that_begin_anew_begin_a_new_curve():
    curve = curve_of(5)
    add_point(curve, 5, 1.0)  # the same step again, as with accumulated gradients
    assert len(curve) == 5
    add_point(curve, 1, 3.0)
    assert curve == [(1, 3.0)]


def test_averages():
    assert averaged(curve_of(5), 2) == [(3, (1 + 4 + 9) / 3), (5, (16 + 25) / 2)]
    assert averaged(curve_of(3), 40) == curve_of(3)
    assert averaged([], 3) == []


def test_the_curve_of_a_run_is_what_its_steps_gave(tmp_path):
    class Remembering(SomebodysModule):
        def __init__(self):
            super().__init__()
            self.losses = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.item())
            return loss

    callback, module = WandaPruning(sparsity=0.5), Remembering()
    trainer(tmp_path, callback, max_steps=4, limit_val_batches=0).fit(module, datamodule=SomebodysData())
    steps, losses = zip(*callback.report.training, strict=True)
    assert steps == (1, 2, 3, 4)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(module.losses))
    assert "over 4 steps" in to_html(callback.report)
    again = WandaPruning(sparsity=0.5)
    again.load_state_dict(callback.state_dict())
    assert [tuple(point) for point in again.report.training] == [*zip(steps, losses, strict=True)]


@pytest.mark.parametrize(("offset", "least"), [(0, "3.1"), (-10, "-6.9")])
def test_the_page_draws_it_from_below_its_least_value(offset, least):
    losses = (3.31, 3.12, 3.25, float("nan"))
    report = PruningReport("Wanda()", "2:4", 0.5, training=[*enumerate((offset + loss for loss in losses), 1)])
    page = to_html(report)
    drawn = page.partition("Training after the pruning")[2].partition("<h2>")[0]
    heights = [float(point.split()[1]) for point in drawn.partition(' d="M0.5')[2].partition('"')[0].split("L")[1:]]
    assert len(heights) == 2
    assert heights[0] > heights[1] > 0  # lower is further down
    assert heights[0] < 100
    assert f'top: 100.00%">{least}<' in drawn
    assert "Training after" not in to_html(PruningReport("Wanda()", "2:4", 0.5, training=[(1, 2.0)]))
