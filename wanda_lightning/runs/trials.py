"""What a sweep and a search share: every trial starts from the dense weights and is told from those of other runs."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from wanda_lightning.callbacks import PruningCallback, ZeroShotEvaluation
from wanda_lightning.engine.fingerprint import differences
from wanda_lightning.model.decoder import every_linear
from wanda_lightning.model.language_model import find_model
from wanda_lightning.model.replaced import replaced
from wanda_lightning.runs.one_shot import check_kinds, end_if_asked, prune, with_callbacks

Settings = Mapping[str, Mapping[str, Any]]


class DenseWeights(Callback):
    """Keeps a copy of the weights as they are before the first pruning, and brings them back before the others.

    Args:
        layers: Name of the list of decoder layers, where the rule for finding it fails.
    """

    def __init__(self, layers: str | list[str] | None = None) -> None:
        self.layers = layers
        self._dense: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy or bring back; this callback stands before the one that prunes."""
        if self._dense:
            self.bring_back(pl_module)
        else:
            self._dense = {name: weight.detach().clone() for name, weight in self._weights(pl_module).items()}

    @torch.no_grad()
    def bring_back(self, module: LightningModule) -> None:
        """Bring the weights back if they were copied before."""
        if self._dense:
            for name, weight in self._weights(module).items():
                weight.copy_(self._dense[name])

    def _weights(self, module: LightningModule) -> dict[str, nn.Parameter]:
        return {linear.parameter_name: linear.weight for linear in every_linear(find_model(module), self.layers)}


def check_whole(trainer: Any, model: LightningModule, datamodule: LightningDataModule | None, what: str) -> None:
    """Refuse a model whose layers are on disk, and evaluations that are broken off, whose figures would be kept.

    Args:
        trainer: The Trainer.
        model: The LightningModule.
        datamodule: Its data.
        what: What cannot be done with them.

    Raises:
        ValueError: If the model is streamed from disk, this is a ``fast_dev_run``, or something is of another kind.
    """
    check_kinds(model, datamodule)
    if trainer.fast_dev_run:
        raise ValueError(f"{what} compares whole evaluations: leave fast_dev_run out, and evaluate on fewer windows")
    if getattr(model, "stream", False):
        raise ValueError(f"{what} keeps the dense weights in memory, and stream leaves them on disk: prune one by one")


def evaluate(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> dict[str, float]:
    """Validate, and return the metrics."""
    trainer.validate(model, datamodule=datamodule, verbose=False)
    end_if_asked(trainer)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def logged_metrics(trainer: Any, model: LightningModule, datamodule: LightningDataModule | None) -> dict[str, float]:
    """Validate on one batch, and with one question of each zero-shot task, to see which metrics there are."""
    with (
        replaced(trainer, "limit_val_batches", 1),
        replaced(trainer, "fast_dev_run", True),  # one question is asked, and no file is written
        with_callbacks(trainer, without=[trainer.progress_bar_callback]),
    ):
        return evaluate(trainer, model, datamodule)


def prune_and_evaluate(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    weights: DenseWeights,
    callback: PruningCallback,
) -> dict[str, float]:
    """Prune from the dense weights with a callback of its own, and return what the validation then gives."""
    with with_callbacks(trainer, weights, callback):
        prune(trainer, model, datamodule=datamodule, evaluate=False, save=False)
        return evaluate(trainer, model, datamodule)


def settings_of(trainer: Any, model: Any, datamodule: Any, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Collect what the figures of trials depend on, besides what each is pruned to and by what, as JSON types."""
    limit = trainer.limit_val_batches
    limited = {} if str(limit) == "1.0" else {"limit_val_batches": limit}  # 1.0 are all batches, 1 is one
    settings = {
        **more,
        "model": {**_hyperparameters(model), **getattr(model, "model_kwargs", {})},
        "data": _hyperparameters(datamodule),
        "trainer": {"precision": trainer.precision, **limited},
    }
    for callback in trainer.callbacks:
        if isinstance(callback, ZeroShotEvaluation):
            asked = {"tasks": callback.tasks, "include_path": callback.include_path}
            settings["zero_shot"] = {**asked, **callback.settings}
    return json.loads(json.dumps(settings, default=str))


def other_settings(before: Settings, now: Settings) -> list[str]:
    """Say where the settings of earlier trials differ from those of now."""
    return [
        f"{part}.{difference}"
        for part in {**before, **now}
        for difference in differences(before.get(part, {}), now.get(part, {})).values()
    ]


def _hyperparameters(part: Any) -> dict[str, Any]:
    return {"class": type(part).__name__, **getattr(part, "hparams", {})}
