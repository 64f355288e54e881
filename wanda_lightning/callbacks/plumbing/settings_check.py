"""What pruning callbacks refuse of their settings, and what is known of training before it begins."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.allocation.selection import Selection
from wanda_lightning.arguments import instance_or_none
from wanda_lightning.calibration.hidden_states import check_activations
from wanda_lightning.engine.settings import PruningSettings
from wanda_lightning.model.language_model import is_language_model
from wanda_lightning.model.stacks import lists_in

if TYPE_CHECKING:
    from wanda_lightning.callbacks.pruning import PruningCallback


def pruning_settings(asked: "PruningCallback") -> PruningSettings:
    """Return what a callback asks of a pruning, as the engine takes it.

    Args:
        asked: The callback.

    Returns:
        Its settings.

    Raises:
        ValueError: If they are of another kind than they should be, or contradict each other.
    """
    return PruningSettings(
        method=asked.method,
        pattern=asked.pattern,
        selection=Selection(asked.targets, asked.ignore, asked.layers, asked.allocation),
        exact_error=asked.exact_error,
        true_sequential=asked.true_sequential,
        reconstruction=asked.reconstruction,
        dense_target=asked.dense_target,
        permute=asked.permute,
    )


def check_settings(asked: "PruningCallback") -> None:
    """Refuse settings that are of another kind than they should be, or contradict each other.

    Args:
        asked: Has the settings.

    Raises:
        ValueError: If there are such.
    """
    pruning_settings(asked)
    check_activations(asked.activations)
    instance_or_none("schedule", asked.schedule, Gradual, "Gradual(start=0, end=100)")
    if asked.schedule is not None:
        asked.schedule.check(asked.method, asked.pattern, asked.allocation, asked.dense_target)


def check_apart(callbacks: Sequence["PruningCallback"], model: nn.Module) -> None:
    """Refuse callbacks that prune the same linears at the same moment: the report of the first would be wrong.

    Args:
        callbacks: Those of a Trainer. Schedules prune at other moments, and what they find is their matter.
        model: What they prune.

    Raises:
        ValueError: Names such a linear.
    """
    at_once = [each for each in callbacks if each.schedule is None]
    taken: dict[str, PruningCallback] = {}
    for each in at_once if len(at_once) > 1 else ():
        for name, pattern in selection_of(each, model).choose(model, each.pattern)[1].items():
            if pattern.sparsity and taken.setdefault(name, each) is not each:
                raise ValueError(
                    f"two pruning callbacks, with {taken[name].method} and {each.method}, prune {name}: give each its "
                    "own targets, or prune with one after the other"
                )


def check_widths(asked: "PruningCallback", model: nn.Module) -> None:
    """Refuse an N:M pattern that a language model's linears do not divide into; of other models not all are called.

    Args:
        asked: Has the pattern.
        model: What is to be pruned.

    Raises:
        ValueError: Names such a linear.
    """
    if is_language_model(model):
        layers, patterns = selection_of(asked, model).choose(model, asked.pattern)
        for linear in (linear for layer in layers for linear in layer.linears):
            patterns[linear.name].check_in_features(linear.weight_OI.shape[1], linear.name)


def selection_of(asked: "PruningCallback", model: nn.Module) -> Selection:
    """Return which linears of a model a callback is to prune, and to what."""
    return Selection(asked.targets, asked.ignore, lists_in(model, asked.layers), asked.allocation)


def will_train(trainer: Trainer) -> bool:
    """Whether ``fit`` comes to a training step."""
    return trainer.limit_train_batches != 0 and 0 not in (trainer.max_epochs, trainer.max_steps)


def steps_are_known(trainer: Trainer, module: LightningModule) -> bool:
    """Whether a schedule can be held against the steps of training: a module that steps by itself takes any number."""
    return module.automatic_optimization and not cast(Any, trainer).fast_dev_run
