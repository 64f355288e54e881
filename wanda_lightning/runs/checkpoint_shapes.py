"""The shapes of a smaller model in a checkpoint, for those who open it without the callbacks that made it smaller."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from wanda_lightning.callbacks import DepthPruning, WidthPruning
from wanda_lightning.callbacks.shape_pruning import due_callbacks
from wanda_lightning.report.shrinking import ShrinkReport

KINDS = {kind.__qualname__: kind for kind in (DepthPruning, WidthPruning)}


def take_shapes(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a model the shapes that a checkpoint has, as far as the states of callbacks in it tell.

    Args:
        model: The model; where it has these shapes already, nothing changes.
        checkpoint: A checkpoint of Lightning, whose weights are loaded afterwards.
    """
    callbacks = []
    for key, state in checkpoint.get("callbacks", {}).items():
        kind = KINDS.get(key.partition("{")[0])
        if kind is not None and state["report"]:
            report = ShrinkReport.from_dict(state["report"])
            callbacks.append(kind(**report.settings))
            callbacks[-1].report = report
    for callback in due_callbacks([*callbacks], model):
        assert callback.report is not None
        callback.reshape(model, callback.report)
