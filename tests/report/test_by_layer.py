"""Layers in the order of their numbers, also those that were left dense."""

from wanda_lightning.report.by_layer import layers
from wanda_lightning.report.linear_report import LinearReport
from wanda_lightning.report.pruning_report import PruningReport


def test_layers_are_in_order():
    report = PruningReport("Wanda()", "unstructured", 0.5)
    report.linears += [
        LinearReport(f"model.layers.{n}.mlp.up_proj", f"model.layers.{n}", (4, 4), 0.5, 0.0) for n in (10, 2)
    ]
    report.not_pruned |= {"model.layers.1.mlp.up_proj": "ignored", "model.layers.1.mlp.experts.30.up": "ignored"}
    report.not_pruned |= {"visual.layers.5.fc1": "not in a linear"}
    assert layers(report) == ["model.layers.1", "model.layers.2", "model.layers.10"]
