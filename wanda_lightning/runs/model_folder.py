"""Saving the model of a run beside its report: the weights, the tokenizer, a model card, adapters."""

import shutil
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from wanda_lightning.atomic_files import whole_folder, write_text
from wanda_lightning.callbacks import SparseFinetuning
from wanda_lightning.callbacks.plumbing.leftovers import remove_search, remove_zero_shot
from wanda_lightning.callbacks.plumbing.run_identity import name_of
from wanda_lightning.callbacks.plumbing.run_report import keeps_files
from wanda_lightning.callbacks.pruning import pruning_callbacks, run_folder
from wanda_lightning.callbacks.shape_pruning import shape_callbacks, shrinking_of
from wanda_lightning.checkpoints import hub, saving
from wanda_lightning.checkpoints.folders import place_for
from wanda_lightning.checkpoints.quiet import without_progress_bars
from wanda_lightning.engine.measured_sparsity import disagreements
from wanda_lightning.engine.processes import Processes
from wanda_lightning.model.language_model import find_model, is_language_model, is_of_transformers
from wanda_lightning.model.offload import is_on_disk
from wanda_lightning.report.model_card import Kind, Training, card_of_smaller, model_card
from wanda_lightning.report.pruning_report import REPORT, REPORT_FILES
from wanda_lightning.report.shrinking import SHRINKING, SHRINKING_FILES
from wanda_lightning.training.lora import has_adapters, save_adapter, without_adapters


def save_pretrained(trainer: Trainer, module: LightningModule) -> None:
    """Save the module's model, tokenizer and a model card; see :meth:`PruningTrainer.save_pretrained`."""
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, SparseFinetuning):
            callback.check()
    if getattr(getattr(module, "lora", None), "merge", "none") == "masked":
        _merge(trainer, cast(Any, module))
    language_model: Any = find_model(module)
    check_reports(trainer, language_model)
    if not keeps_files(trainer):
        return
    folder = run_folder(trainer)
    with Processes().together():
        if trainer.is_global_zero:
            _write(trainer, module, language_model, folder)
    for pruning in pruning_callbacks(trainer):
        pruning.run.results.saved = True
    if reopen := cast(Any, getattr(module, "reopen", None)):
        reopen(folder / "model")
    if reopen or not is_on_disk(language_model):
        for pruning in pruning_callbacks(trainer):
            pruning.run.files.forget_layers(trainer)
    if getattr(trainer, "push_to_hub", None):
        _push(cast(Any, trainer), folder / "model")


def check_model_folder(trainer: Trainer) -> None:
    """Refuse to save over a model that is of no run, such as the dense one, or of one of another kind; all must ask.

    Args:
        trainer: The Trainer; what its callbacks are to overwrite may be any model.

    Raises:
        ValueError: If there is such a model, or something else than one.
    """
    callbacks = _callbacks(trainer)
    if not callbacks or not keeps_files(trainer):
        return
    folder = run_folder(trainer)
    place = place_for(folder / "model")
    if any(callback.overwrite for callback in callbacks):
        return
    advice = "choose another folder, or say overwrite=True to the callback (--overwrite on the command line) to replace"
    if others := _reports_of_others(trainer, folder):
        raise ValueError(f"{folder} holds the results of another run, {others[0].name}: {advice} them")
    if any(place.glob("*")) and not any((folder / report).exists() for report in (REPORT, SHRINKING)):
        raise ValueError(f"{place} holds a model, and no report of the run that made it lies beside it: {advice} it")


def _callbacks(trainer: Trainer) -> list[Any]:
    """List the callbacks of a Trainer that write a report."""
    return [*pruning_callbacks(trainer), *shape_callbacks(trainer)]


def _reports_of_others(trainer: Trainer, folder: Path) -> list[Path]:
    """Find the reports in a folder of the kinds that no callback of this run writes."""
    names = [] if pruning_callbacks(trainer) else [*REPORT_FILES]
    names += [] if shape_callbacks(trainer) else SHRINKING_FILES
    return [file for name in names if (file := folder / name).exists()]


def _write(trainer: Trainer, module: LightningModule, language_model: Any, folder: Path) -> None:
    """Write the model and what belongs to it; one process does."""
    with without_adapters(language_model) as plain:
        if is_of_transformers(plain):
            saving.save_pretrained(cast(Any, plain), getattr(module, "tokenizer", None), folder / "model")
        else:
            saving.save_weights(plain, folder / "model")
    _write_card(trainer, module, folder / "model")
    if has_adapters(language_model):
        with whole_folder(folder / "adapter") as unfinished, without_progress_bars():
            save_adapter(language_model, unfinished, base=(folder / "model").resolve())
    elif (folder / "adapter/adapter_config.json").is_file():  # of an earlier run, on top of the model that was there
        shutil.rmtree(folder / "adapter")
    if others := _reports_of_others(trainer, folder):  # of the model that was there
        for report in others:
            report.unlink()
        remove_search(folder)
        if callbacks := _callbacks(trainer):
            steps = [f"step-{number}" for number in range(1, trainer.global_step + 1)]
            remove_zero_shot(folder, callbacks[0].evaluations, keep=steps)


def _push(trainer: Any, folder: Path) -> None:
    """Push a saved model to the hub; not before the results of the run are on disk."""

    def push() -> None:
        trainer.hub_url = hub.push(folder, trainer.push_to_hub)
        trainer.push_failed = trainer.hub_url is None

    if callbacks := pruning_callbacks(trainer):
        callbacks[0].run.results.write(folder, push, trainer)
    elif trainer.is_global_zero:
        push()


def check_reports(trainer: Trainer, model: Any) -> None:
    """Make sure that the reports of a run are true of the model that is to be saved.

    Args:
        trainer: Has the callbacks that hold the reports.
        model: The model of transformers.

    Raises:
        RuntimeError: If a report is of other weights, with the linears and what is wrong.
    """
    for callback in pruning_callbacks(trainer):
        if callback.report is not None and (wrong := disagreements(model, callback.report, callback.layers)):
            names = "; ".join(f"{name}: {what}" for name, what in list(wrong.items())[:3])
            raise RuntimeError(
                f"the report is not of these weights, {len(wrong)} linears differ ({names}"
                f"{'; ...' if len(wrong) > 3 else ''}): something changed them, or this is another model. Prune it "
                "with fit or PruningTrainer.prune before it is saved"
            )


def _write_card(trainer: Trainer, module: LightningModule, folder: Path) -> None:
    callbacks = pruning_callbacks(trainer)
    reports = [callback.report for callback in callbacks if callback.report is not None]
    shrinking, base, steps = shrinking_of(trainer, module), name_of(module), trainer.global_step
    if reports:
        training, kind = _training(trainer, module), _kind(find_model(module))
        card = model_card(reports[0], base, training, steps, reports[1:], shrinking, kind)
        write_text(folder / "README.md", card)
    elif shrinking is not None:
        trained = any(callback.trained for callback in shape_callbacks(trainer))
        write_text(folder / "README.md", card_of_smaller(shrinking, base, steps if trained else 0))


def _kind(model: nn.Module) -> Kind:
    if is_language_model(model):
        return "language model"
    return "of transformers" if is_of_transformers(model) else "module"


def _training(trainer: Trainer, module: LightningModule) -> Training:
    callbacks = pruning_callbacks(trainer)
    if not any(callback.run.results.trained for callback in callbacks):
        return "none"
    if getattr(module, "merged", False):
        return "merged"
    if has_adapters(module):
        return "adapter"
    return "whole" if all(callback.schedule is None for callback in callbacks) else "gradual"


def _merge(trainer: Trainer, module: Any) -> None:
    if module.merged:
        return
    module.merge_adapters()
    evaluated = any("fine-tuned" in callback.evaluations for callback in pruning_callbacks(trainer))
    if evaluated and (datamodule := getattr(trainer, "datamodule", None)) is not None:
        trainer.validate(module, datamodule=datamodule, verbose=False)
