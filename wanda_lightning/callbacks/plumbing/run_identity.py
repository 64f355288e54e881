"""What tells runs apart: the model, the settings and the data, as a report describes them."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from wanda_lightning.callbacks.plumbing.loaders import datamodule_of
from wanda_lightning.callbacks.plumbing.settings_check import pruning_settings
from wanda_lightning.model.language_model import find_model
from wanda_lightning.model.linears import own_parameters

if TYPE_CHECKING:
    from wanda_lightning.callbacks.pruning import PruningCallback


def name_of(module: LightningModule) -> str | None:
    """Return the name or path that a LightningModule was given for its model, if it was given one as ``pretrained``."""
    name = getattr(module, "pretrained", None) or getattr(module.hparams, "pretrained", None)
    return None if name is None else str(name)


def describe_model(module: LightningModule) -> dict[str, Any]:
    """Describe a module's model for a report.

    Args:
        module: The LightningModule that holds it, in its Trainer.

    Returns:
        Its ``name`` or path as given, else its class; its ``revision`` on the hub, if that is known; the number of its
        ``parameters``, where shared ones count once and those of adapters do not; and their ``dtype``, or several, with
        the mixed precision that they are used in, such as ``float32, bf16-mixed``.
    """
    model = find_model(module)
    config: Any = getattr(model, "config", None)
    asked = getattr(module, "model_kwargs", None) or {}
    revision = asked.get("revision") or getattr(config, "_commit_hash", None)
    parameters = own_parameters(model)
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    precision = str(module.trainer.precision)  # which calibration runs in, too
    return {
        "name": name_of(module) or getattr(config, "_name_or_path", "") or type(model).__name__,
        **({"revision": str(revision)} if revision else {}),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": ", ".join([*dtypes, precision] if precision.endswith("-mixed") else dtypes),
    }


def describe_calibration(trainer: Trainer) -> dict[str, Any]:
    """Return what the datamodule says of its calibration set, if it says anything."""
    describe = getattr(datamodule_of(trainer), "describe", None)
    return describe() if describe else {}


def describe_settings(asked: "PruningCallback") -> dict[str, Any]:
    """Return what a callback asks for, as plain types."""
    return {**pruning_settings(asked).described(), "schedule": str(asked.schedule) if asked.schedule else None}
