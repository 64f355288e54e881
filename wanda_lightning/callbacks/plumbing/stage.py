"""The stage that the weights of a run are in: one name for it in reports, file names and model cards."""

from typing import Literal

from lightning.pytorch import LightningModule

Stage = Literal["dense", "as loaded", "pruned", "fine-tuned", "merged"]


def stage_of(module: LightningModule, pruned: bool, trained: bool, came_with_zeros: bool) -> Stage:
    """Name the stage that a module's weights are in.

    Args:
        module: A LightningModule; one whose adapters were merged says so in its ``merged``.
        pruned: Whether the weights are pruned as asked for.
        trained: Whether they were trained since then.
        came_with_zeros: Whether they have zeros of an earlier pruning.

    Returns:
        The name.
    """
    if not pruned:
        return "as loaded" if came_with_zeros else "dense"
    if getattr(module, "merged", False):
        return "merged"
    return "fine-tuned" if trained else "pruned"
