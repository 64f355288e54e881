"""What a pruning callback refuses of its settings, before there is a model, and what is known of training by then."""

from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer

from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.allocation.selection import Selection
from wanda_lightning.arguments import instance_or_none
from wanda_lightning.calibration.hidden_states import check_place
from wanda_lightning.engine.reconstruction import Reconstruction

if TYPE_CHECKING:
    from wanda_lightning.callbacks.pruning import PruningCallback


def check_settings(asked: "PruningCallback") -> None:
    """Refuse settings that are of another kind than they should be, or contradict each other.

    Args:
        asked: Has the settings.

    Raises:
        ValueError: If there are such.
    """
    asked.method.check(asked.pattern)
    if allocator := Selection(asked.targets, asked.ignore, asked.layers, asked.allocation).allocator:
        allocator.check_pattern(asked.pattern)
    check_place(asked.activations)
    instance_or_none("reconstruction", asked.reconstruction, Reconstruction, "Reconstruction(epochs=3)")
    instance_or_none("schedule", asked.schedule, Gradual, "Gradual(start=0, end=100)")
    if asked.schedule is not None:
        asked.schedule.check(asked.method, asked.pattern, asked.allocation, asked.dense_target)


def will_train(trainer: Trainer) -> bool:
    """Whether ``fit`` comes to a training step."""
    return trainer.limit_train_batches != 0 and 0 not in (trainer.max_epochs, trainer.max_steps)


def steps_are_known(trainer: Trainer, module: LightningModule) -> bool:
    """Whether a schedule can be held against the steps of training: a module that steps by itself takes any number."""
    return module.automatic_optimization and not cast(Any, trainer).fast_dev_run
