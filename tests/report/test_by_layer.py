"""Layers in the order of their numbers, also those that were left dense."""

from wanda_lightning.report.by_layer import labels, layers
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
    assert labels(report) == ["1", "2", "10"]


def test_each_of_several_lists_is_told_by_its_name():
    report = PruningReport("Wanda()", "unstructured", 0.5)
    report.linears += [
        LinearReport(f"{part}.layers.{n}.fc1", f"{part}.layers.{n}", (4, 4), 0.5, 0.0)
        for part in ("encoder", "decoder")
        for n in (0, 1)
    ]
    report.not_pruned |= {"decoder.layers.2.fc1": "ignored"}
    names = ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1", "decoder.layers.2"]
    assert (layers(report), labels(report)) == (names, names)
