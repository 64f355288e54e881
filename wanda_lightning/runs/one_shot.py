"""Pruning without training: evaluate, prune, evaluate, save."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from wanda_lightning.callbacks.plumbing.settings_check import check_apart, check_widths, steps_are_known
from wanda_lightning.callbacks.pruning import pruning_callbacks
from wanda_lightning.callbacks.shape_pruning import check_folder, due_callbacks, shape_callbacks, shrinking_of
from wanda_lightning.model.language_model import find_language_model, find_model
from wanda_lightning.model.replaced import replaced
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.report.shrinking import Shrinking
from wanda_lightning.runs.model_folder import check_model_folder, save_pretrained


def prune(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None = None,
    evaluate: bool = True,
    save: bool = True,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
) -> PruningReport | Shrinking:
    """Prune once with the pruning callbacks of a Trainer; see :meth:`PruningTrainer.prune`."""
    _check(trainer, module, datamodule, save)
    callbacks = pruning_callbacks(trainer)
    if train_dataloaders is not None and val_dataloaders is None:  # as fit, which then does not validate
        evaluate = evaluate and is_overridden("val_dataloader", module)
    with whole_run(trainer, module, save):
        for callback in callbacks:
            callback.run.files.open_layers(trainer, until_saved=True)  # before anything is written to the folder
        if evaluate:
            with with_callbacks(trainer, _ChecksFirst()):
                _evaluate(trainer, module, datamodule, val_dataloaders)
        if any(callback.schedule is not None for callback in callbacks):
            first = callbacks[0]
            return PruningReport(str(first.method), str(first.pattern), first.pattern.sparsity)
        with no_training(trainer):
            trainer.fit(module, train_dataloaders, val_dataloaders, datamodule)
        if evaluate:
            _evaluate(trainer, module, datamodule, val_dataloaders)
        if save:
            save_pretrained(trainer, module)
    report = callbacks[0].report if callbacks else shrinking_of(trainer, module)
    assert report is not None
    return report


def _check(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None, save: bool) -> None:
    """Refuse what cannot be pruned here, as far as it shows before model and data are loaded."""
    check_kinds(module, datamodule)
    callbacks = pruning_callbacks(trainer)
    if not callbacks and not shape_callbacks(trainer):
        raise ValueError(
            "nothing to prune with: give the Trainer a pruning callback such as WandaPruning; on the command line "
            "a recipe has one, such as -c wanda"
        )
    schedules = [callback.schedule for callback in callbacks if callback.schedule is not None]
    if schedules and save:
        raise ValueError("a gradual schedule prunes while a model trains: use fit, or leave the schedule out")
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"{type(trainer.strategy).__name__} loads and prunes the model in processes that end before it is saved: "
            'use strategy="ddp"'
        )
    if trainer.max_steps >= 0 and steps_are_known(trainer, module):
        for schedule in schedules:
            schedule.check_steps(trainer.max_steps)


def check_kinds(module: object, datamodule: object) -> None:
    """Refuse what is no LightningModule, or no datamodule.

    Args:
        module: A LightningModule, or a compiled one.
        datamodule: A LightningDataModule, or None.

    Raises:
        ValueError: If one is something else.
    """
    if not hasattr(module, "automatic_optimization"):  # which a compiled one hands on
        raise ValueError(f"model must be a LightningModule, such as CausalLM(name), got a {type(module).__name__}")
    if datamodule is not None and not hasattr(datamodule, "prepare_data"):
        raise ValueError(
            f"datamodule must be a LightningDataModule, got {type(datamodule).__name__}: prune takes dataloaders by "
            "name, as train_dataloaders and val_dataloaders"
        )


@contextmanager
def whole_run(trainer: Trainer, module: LightningModule, will_save: bool) -> Iterator[None]:
    """Keep the results of an earlier run until everything within is done; if that fails, they stay.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        will_save: Whether the model will be saved: then one that cannot be is refused before it is pruned.

    Raises:
        ValueError: If these results are of another model or of other settings, or a model is there that is of no run,
            and they are not to be overwritten.
    """
    check_folder(trainer)
    if will_save:
        check_model_folder(trainer)
    runs = [callback.run.files for callback in pruning_callbacks(trainer)]
    for run in runs:
        run.begin(trainer, module, loaded=False)
        run.will_save |= will_save
    try:
        yield
    except BaseException:
        for run in runs:
            run.abandon()
        raise
    for run in runs:
        run.end_run()


def end_if_asked(trainer: Trainer) -> None:
    """End after a SIGTERM that came during the last batch; the next run would forget about it."""
    if trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False):
        raise SIGTERMException(143)


class _ChecksFirst(Callback):
    """Refuses what it can, such as targets that match nothing, when model and data are there, not hours later."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if shaping := shape_callbacks(trainer):
            model = find_language_model(pl_module)
            for each in due_callbacks(shaping, model):
                each.check(model)
        check_apart(pruning_callbacks(trainer), find_model(pl_module))
        for callback in pruning_callbacks(trainer):
            callback.run.files.check_folder(trainer, pl_module)  # whose results may be of other data
            callback.run.stage(pl_module)  # which looks for all targets
            check_widths(callback, find_model(pl_module))


def _evaluate(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None, dataloaders: Any
) -> None:
    trainer.validate(module, dataloaders, datamodule=datamodule, verbose=False)
    end_if_asked(trainer)


@contextmanager
def no_training(trainer: Trainer) -> Iterator[None]:
    """Make ``fit`` stop before the first training step, after ``on_fit_start``."""
    with replaced(trainer, "limit_train_batches", 0), replaced(trainer, "num_sanity_val_steps", 0):
        yield


@contextmanager
def with_callbacks(trainer: Any, *callbacks: Callback, without: Collection[Callback] = ()) -> Iterator[None]:
    """Give a Trainer more callbacks for a while, and take others away."""
    before = list(trainer.callbacks)
    trainer.callbacks[:] = [*(callback for callback in before if callback not in without), *callbacks]
    try:
        yield
    finally:
        trainer.callbacks[:] = before
