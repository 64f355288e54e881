"""Checkpoints of the weights alone, in which Lightning leaves out the state of callbacks."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer


def keep_states(trainer: Trainer, callbacks: Sequence[Callback]) -> None:
    """Write the states of some callbacks into checkpoints of the weights alone, too.

    Args:
        trainer: The Trainer, from now on.
        callbacks: Those without whose states the weights cannot be loaded again.
    """
    strategy: Any = trainer.strategy
    if "save_checkpoint" in vars(strategy):  # in an earlier run of this Trainer
        return
    save = strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        checkpoint.setdefault("callbacks", {each.state_key: each.state_dict() for each in callbacks})
        save(checkpoint, *args, **kwargs)

    strategy.save_checkpoint = save_checkpoint
