"""Averages of the weights that other callbacks keep, in copies that they made before the weights were pruned."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averages(trainer: Trainer, begun: bool = True) -> Iterator[nn.Module]:
    """Find the copies of a module in the callbacks of its Trainer.

    Args:
        trainer: The Trainer.
        begun: Whether also those are meant that a training step has entered already.

    Yields:
        Each copy.
    """
    for callback in getattr(trainer, "callbacks", []):
        average = getattr(callback, "_average_model", None)
        # torch's AveragedModel wraps its copy, and counts; Lightning's StochasticWeightAveraging holds it as it is.
        waits = isinstance(average, AveragedModel) and not average.n_averaged
        if isinstance(average, nn.Module) and (begun or waits):
            yield average if isinstance(average, LightningModule) else getattr(average, "module", average)


@torch.no_grad()
def begin_averages(trainer: Trainer, module: LightningModule) -> None:
    """Give averages that no step has entered yet the weights as they are now.

    Args:
        trainer: The Trainer.
        module: Its module, pruned.
    """
    weights = dict(module.named_parameters())
    for average in averages(trainer, begun=False):
        for name, copy in average.named_parameters():
            copy.copy_(weights[name])


def refuse_averages(trainer: Trainer) -> None:
    """Refuse callbacks that average weights whose shapes are about to change.

    Args:
        trainer: The Trainer.

    Raises:
        ValueError: If it has such a callback.
    """
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} has copied the weights before they are made smaller: do that in a run "
                "without it, save the model, and train the saved one"
            )
