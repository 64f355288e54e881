"""How a LightningModule runs its model on a calibration batch: by its own step, as in validation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torchmetrics import Metric

from wanda_lightning.calibration.feed import Forward, call_with
from wanda_lightning.callbacks.plumbing.loaders import Hook, as_it_is, datamodule_of
from wanda_lightning.model.language_model import find_model, is_language_model
from wanda_lightning.model.modes import as_written, in_eval_mode
from wanda_lightning.model.replaced import replaced

CALIBRATION_STEP = "calibration_step"
"""The method that a LightningModule may have for this, with the arguments of a ``validation_step``."""

TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""What a datamodule or a module may do to batches on their way."""


def forward_of(trainer: Trainer, module: LightningModule) -> Forward | None:
    """Choose what runs the model of a LightningModule on a calibration batch.

    Args:
        trainer: The Trainer, which moves batches to where the module is.
        module: The module.

    Returns:
        Its ``calibration_step``; else None where its model is a language model, which is called with token ids; else
        its ``validation_step``; else its ``forward``. It raises a ValueError if there is none of them.
    """
    step: Callable[..., Any] | None = getattr(module, CALIBRATION_STEP, None)
    if step is None and is_language_model(find_model(module)):
        return None
    if step is None and is_overridden("validation_step", module):
        step = module.validation_step

    def forward(_: nn.Module, batch: Any) -> Any:
        if step is None and not is_overridden("forward", module):
            raise ValueError(
                f"nothing says how {type(module).__name__} runs its model on a calibration batch: give it a "
                f"{CALIBRATION_STEP}(batch, batch_idx), a validation_step, or a forward"
            )
        batch = _transferred(batch, trainer)
        if step is None:
            return call_with(module, batch)
        numbers = [0] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else []
        if numbers and is_param_in_hook_signature(step, "dataloader_idx", min_args=3):
            numbers.append(0)
        return step(batch, *numbers)  # by position, as Lightning does: names are the user's

    return forward


def hooks_of(trainer: Trainer) -> Hook:
    """Choose what is done to a batch for a step, where the module's own step is not called.

    Args:
        trainer: The Trainer.

    Returns:
        Passes a batch through the hooks of datamodule and module, such as one that pads texts; it leaves the batch as
        it is, which training may read later. Where they have none it does nothing.
    """
    owners = (trainer.lightning_module, datamodule_of(trainer))
    if any(is_overridden(hook, owner, DataHooks) for owner in owners if owner is not None for hook in TRANSFERS):
        return lambda batch: _transferred(deepcopy(batch), trainer)
    return as_it_is


def _transferred(batch: Any, trainer: Trainer) -> Any:
    """Bring a batch to where the module is, through the hooks that Lightning calls on the way to a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def as_in_validation(module: LightningModule) -> Iterator[None]:
    """Let steps of a module be called outside of Lightning's loops, and leave it as it was.

    It is in eval mode and runs uncompiled; what it logs goes nowhere, for there is no loop that would collect it; and
    its metrics forget what they see.

    Args:
        module: The module.
    """
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    kept = [{name: deepcopy(value) for name, value in _state(metric).items()} for metric in metrics]
    logged, logged_together = (replaced(module, name, _log_nothing) for name in ("log", "log_dict"))
    with as_written(module), in_eval_mode(module), logged, logged_together:
        try:
            yield
        finally:
            for metric, values in zip(metrics, kept, strict=True):
                for name, value in values.items():
                    setattr(metric, name, value)


def _state(metric: Metric) -> dict[str, Any]:
    counters = {name: getattr(metric, name) for name in ("_update_count", "_computed") if hasattr(metric, name)}
    return {**cast(Any, metric).metric_state, **counters}


def _log_nothing(*_: Any, **__: Any) -> None:
    pass
