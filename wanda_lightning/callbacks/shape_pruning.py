"""Pruning that changes the shapes of a model: before there are optimizers, and again before a checkpoint is loaded."""

import logging
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from typing_extensions import override

from wanda_lightning.callbacks.plumbing.averages import refuse_averages
from wanda_lightning.callbacks.plumbing.before_setup import before_setup
from wanda_lightning.callbacks.plumbing.calibration_batches import CalibrationBatches
from wanda_lightning.callbacks.plumbing.process_group import leave_gloo_at_exit
from wanda_lightning.callbacks.plumbing.progress import noticing_sigterm, progress
from wanda_lightning.callbacks.plumbing.run_identity import describe_model
from wanda_lightning.callbacks.plumbing.run_report import keeps_files
from wanda_lightning.callbacks.plumbing.unfinished_layers import keeping_layers
from wanda_lightning.callbacks.plumbing.weights_only import keep_states
from wanda_lightning.callbacks.pruning import run_folder
from wanda_lightning.engine.processes import Processes
from wanda_lightning.json_files import read_json
from wanda_lightning.model.configuration import says
from wanda_lightning.model.language_model import find_language_model
from wanda_lightning.report.shrinking import SHRINKING, Shrinking, ShrinkReport

log = logging.getLogger(__name__)


class ShapePruning(Callback):
    """What callbacks that make a model smaller have in common.

    The model is changed once, in ``fit``, after it was loaded and before it is moved, wrapped and given to optimizers.
    ``validate`` and ``test`` change nothing. A checkpoint of such a run says what was removed: whoever resumes from it,
    or evaluates it, with the same callbacks gets the module in these shapes before the weights are loaded.

    Args:
        num_samples: How many sequences to take where calibration uses the train dataloader.
        overwrite: Replace the results in the folder also if they are of other settings.
        **settings: What is asked for, by the names of :func:`wanda_lightning.prune_width` or
            :func:`wanda_lightning.prune_depth`.

    Attributes:
        prune: That function with these settings: makes a model smaller, given calibration batches.
        resume: Whether the layers that it has finished are kept on disk, for a run that is cut off; None where it
            finishes none before the last.
    """

    prune: Callable[..., ShrinkReport]
    resume: bool | None = None

    def __init__(self, num_samples: int, overwrite: bool, **settings: Any) -> None:
        self.calibration = CalibrationBatches(num_samples)
        self.num_samples, self.overwrite, self.settings = self.calibration.num_samples, overwrite, settings
        self.report: ShrinkReport | None = None
        self.evaluations: dict[str, dict[str, float]] = {}
        self.calibrated: dict[str, Any] = {}
        self.trained = False

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Refuse a model that cannot be made smaller as asked for, before any callback changes it."""

    @abstractmethod
    def reshape(self, model: nn.Module, report: ShrinkReport) -> None:
        """Give a model the shapes that a report tells of; its values are loaded afterwards."""

    @property
    @override
    def state_key(self) -> str:
        """Tell callbacks of different settings apart in a checkpoint."""
        return self._generate_state_key(**self.settings)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the moment in which the model is loaded and nothing holds its parameters yet."""
        leave_gloo_at_exit()
        callbacks = shape_callbacks(trainer)
        if self is not callbacks[0]:  # which speaks for all of them, in their order
            return
        if stage == "fit":
            _check_strategy(trainer)
            check_folder(trainer)
        keep_states(trainer, callbacks)
        before_setup(
            trainer,
            partial(_prune_all, callbacks, trainer, pl_module, prunes=stage == "fit"),
            partial(reshape_all, callbacks, pl_module),
        )

    def begin_anew(self) -> None:
        """Forget the model that was made smaller, if there is one: this is another."""
        if self.report is not None:
            self.report, self.evaluations, self.trained = None, {}, False

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Remember that the weights are no longer as they were left."""
        self.trained = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the metrics of ``trainer.validate`` into the report, under the stage that the weights are in."""
        callbacks = shape_callbacks(trainer)
        if trainer.state.fn != "validate" or self is not callbacks[0]:
            return
        for callback in due_callbacks(callbacks, find_language_model(pl_module)):
            callback.begin_anew()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.evaluations[stage_of_shapes(trainer, pl_module)] = metrics
        save(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to give a module these shapes again."""
        plain = {name: getattr(self, name) for name in ("evaluations", "calibrated", "trained")}
        return {"report": self.report.to_dict() if self.report else None, **plain}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run that wrote the checkpoint."""
        self.report = ShrinkReport.from_dict(state_dict["report"]) if state_dict["report"] else None
        for name in ("evaluations", "calibrated", "trained"):
            setattr(self, name, state_dict[name])


def shape_callbacks(trainer: Trainer) -> list[ShapePruning]:
    """List the callbacks of a Trainer that change the shapes of its model."""
    return [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, ShapePruning)]


def due_callbacks(callbacks: list[ShapePruning], model: Any) -> list[ShapePruning]:
    """List the callbacks that did not make a model what it is; what a later one of a kind makes of a number, counts."""
    made = {path: after for each in callbacks if each.report for path, (_, after) in each.report.sizes.items()}
    says_so = {path: says(model.config, tuple(path.split(".")), after) for path, after in made.items()}
    return [each for each in callbacks if each.report is None or not all(says_so[path] for path in each.report.sizes)]


def stage_of_shapes(trainer: Trainer, module: LightningModule) -> str:
    """Name the stage that a module's model is in, by looking at it."""
    callbacks = shape_callbacks(trainer)
    due = due_callbacks(callbacks, find_language_model(module))
    return "dense" if due else "fine-tuned" if callbacks[0].trained else "smaller"


def shrinking_of(trainer: Trainer, module: LightningModule) -> Shrinking | None:
    """Gather what the callbacks of a Trainer made of a module's model; None before they did."""
    callbacks = shape_callbacks(trainer)
    if not callbacks or due_callbacks(callbacks, find_language_model(module)):
        return None
    reports = [callback.report for callback in callbacks if callback.report is not None]
    return Shrinking(reports, describe_model(module), callbacks[0].evaluations, callbacks[0].calibrated)


def save(trainer: Trainer, module: LightningModule) -> None:
    """Write the report of all callbacks into the folder of the run, if the model is smaller already."""
    folder, shrinking = run_folder(trainer), shrinking_of(trainer, module)  # all processes must ask for them
    if shrinking is not None and trainer.is_global_zero and keeps_files(trainer):
        shrinking.save(folder)


def _prune_all(callbacks: list[ShapePruning], trainer: Trainer, module: LightningModule, prunes: bool) -> None:
    """Have every callback make the model smaller, unless it did."""
    model: Any = find_language_model(module)
    due = due_callbacks(callbacks, model)
    if not prunes or not due:
        return
    refuse_averages(trainer)
    trainer.strategy.model_to_device()
    for callback in due:
        callback.check(model)
        callback.begin_anew()
    folder = run_folder(trainer)  # all processes must ask for it
    resume = [callback.resume if keeps_files(trainer) else None for callback in callbacks]
    with keeping_layers(trainer, folder, resume) as journals:
        for callback in due:
            batches = callback.calibration.of(trainer)  # which may draw from the random numbers of training
            with isolate_rng(), trainer.precision_plugin.forward_context(), noticing_sigterm() as asked_to_end:
                callback.report = callback.prune(
                    model,
                    batches,
                    processes=Processes(),
                    progress=partial(progress, trainer, asked_to_end),
                    **journals[callbacks.index(callback)],
                )
            callback.calibrated = callback.calibration.describe(trainer)
            if trainer.is_global_zero:
                log.info("%s", callback.report.summary)
    save(trainer, module)


def reshape_all(callbacks: list[ShapePruning], module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give the module the shapes that a checkpoint has, as far as its callbacks tell."""
    model: Any = find_language_model(module)
    states = checkpoint.get("callbacks", {})
    for callback in callbacks:
        kind = type(callback)
        of_kind = [state for key, state in states.items() if key.startswith(kind.__qualname__)]
        number = [each for each in callbacks if type(each) is kind].index(callback)
        if number < len(of_kind) and of_kind[number]["report"]:
            callback.load_state_dict(of_kind[number])
    for callback in due_callbacks(callbacks, model):
        if callback.report is not None:
            callback.reshape(model, callback.report)


def _check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which the shapes of a model cannot change in ``fit``."""
    name = type(trainer.strategy).__name__
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"{name} starts processes that send their weights back to the first one, whose model keeps its shapes: use "
            'strategy="ddp"'
        )
    if trainer.strategy.restore_checkpoint_after_setup:
        raise ValueError(
            f"{name} shards weights before they can be pruned: make the model smaller on one device or with DDP, save "
            "it, and train the saved model sharded"
        )


def check_folder(trainer: Trainer) -> None:
    """Refuse a folder with a report of other settings; every process must ask.

    Args:
        trainer: The Trainer; nothing is refused if its callbacks do not change shapes, or are to overwrite results.

    Raises:
        ValueError: If the folder holds such a report.
    """
    callbacks = shape_callbacks(trainer) if keeps_files(trainer) else []
    file = run_folder(trainer) / SHRINKING if callbacks else None
    if file is None or not file.exists() or any(callback.overwrite for callback in callbacks):
        return
    try:
        there = [step["settings"] for step in read_json(file)["steps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report of a run ({error!r}): choose another folder") from error
    now = [callback.settings for callback in callbacks]
    if there != now:
        raise ValueError(
            f"{file.parent} holds the results of another run, with {there}, not {now}: choose another folder, or say "
            "overwrite=True to the callback (--overwrite on the command line) to replace them"
        )
