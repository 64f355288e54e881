"""The shapes of a smaller model in a checkpoint, for those who open it without the callbacks that made it smaller."""

from typing import Any

from lightning.pytorch import LightningModule

from wanda_lightning.callbacks import DepthPruning, WidthPruning
from wanda_lightning.callbacks.shape_pruning import reshape_all

KINDS = {kind.__qualname__: kind for kind in (DepthPruning, WidthPruning)}


def take_shapes(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give the model of a module the shapes that a checkpoint has, as far as the states of callbacks in it tell.

    Args:
        module: The module; where its model has these shapes already, nothing changes.
        checkpoint: A checkpoint of Lightning, whose weights are loaded afterwards.
    """
    callbacks = [
        KINDS[kind](**state["report"]["settings"])
        for key, state in checkpoint.get("callbacks", {}).items()
        if (kind := key.partition("{")[0]) in KINDS and state["report"]
    ]
    if callbacks:
        reshape_all([*callbacks], module, checkpoint)
