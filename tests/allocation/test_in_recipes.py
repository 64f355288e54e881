"""Allocations as recipes write them."""

import pytest
from jsonargparse import ArgumentParser

from wanda_lightning.allocation.atp import ATP
from wanda_lightning.allocation.least_loss import LeastLoss
from wanda_lightning.allocation.owl import OWL
from wanda_lightning.callbacks import PruningCallback


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"class_path": "wanda_lightning.OWL"}, OWL()),
        ({"class_path": "wanda_lightning.ATP", "init_args": {"beta": 0.01}}, ATP(0.01)),
        (
            {"class_path": "wanda_lightning.LeastLoss", "init_args": {"choices": ["dense", "2:4"], "rounds": 2}},
            LeastLoss(["dense", "2:4"], rounds=2),
        ),
        ({"q_proj": 0.25, "down_proj": "2:4"}, {"q_proj": 0.25, "down_proj": "2:4"}),
        (None, None),
    ],
)
def test_a_recipe_names_an_allocation(written, meant):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=PruningCallback)
    init_args = {"sparsity": 0.6, "allocation": written}
    config = parser.parse_object({"callback": {"class_path": "wanda_lightning.WandaPruning", "init_args": init_args}})
    assert parser.instantiate_classes(config).callback.allocation == meant
    again = parser.parse_string(parser.dump(config))  # as config.yaml keeps it
    assert parser.instantiate_classes(again).callback.allocation == meant
