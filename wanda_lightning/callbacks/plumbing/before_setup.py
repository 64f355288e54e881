"""The moment between ``configure_model`` and the strategy's set-up, for which Lightning has no hook.

There the model is whole and in memory, in all processes, and nothing holds its parameters yet: neither an optimizer nor
DDP. Where a run is resumed, its checkpoint is loaded a little earlier.
"""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer


def before_setup(trainer: Trainer, act: Callable[[], None], before_loading: Callable[[dict[str, Any]], None]) -> None:
    """Have something done before the strategy sets up the model, once.

    Args:
        trainer: The Trainer; this is to be called in a callback's ``setup``.
        act: Is called before the model is converted, wrapped and given to optimizers.
        before_loading: Is called with a checkpoint before its weights are loaded.
    """
    strategy: Any = trainer.strategy

    def forget() -> None:
        del strategy.setup, strategy.load_model_state_dict, strategy.is_set_up_later

    if hasattr(strategy, "is_set_up_later"):  # by a run that failed before it came so far
        forget()
    setup, load = strategy.setup, strategy.load_model_state_dict

    def set_up(trainer: Trainer) -> None:
        forget()
        act()
        setup(trainer)

    def load_model_state_dict(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        before_loading(checkpoint)
        load(checkpoint, *args, **kwargs)

    strategy.setup, strategy.load_model_state_dict = set_up, load_model_state_dict
    strategy.is_set_up_later = True
