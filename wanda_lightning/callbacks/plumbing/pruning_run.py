"""What a pruning callback does to the weights that it finds: look at them, prune them, tell of them."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from wanda_lightning.allocation.allocator import patterns_of
from wanda_lightning.allocation.by_name import allocate
from wanda_lightning.callbacks.plumbing.module_step import as_in_validation, forward_of
from wanda_lightning.callbacks.plumbing.optimizers import copies_follow
from wanda_lightning.callbacks.plumbing.progress import noticing_sigterm, progress
from wanda_lightning.callbacks.plumbing.run_files import RunFiles
from wanda_lightning.callbacks.plumbing.run_identity import describe_model, describe_settings
from wanda_lightning.callbacks.plumbing.run_report import RunReport
from wanda_lightning.callbacks.plumbing.samples import samples_of
from wanda_lightning.callbacks.plumbing.settings_check import pruning_settings, selection_of, steps_are_known
from wanda_lightning.callbacks.plumbing.stage import Stage, stage_of
from wanda_lightning.checkpoints.saving_check import check_can_be_saved
from wanda_lightning.engine.checks import refuse_sharded
from wanda_lightning.engine.measured_sparsity import (
    NOTABLE,
    linears_of,
    linears_with_zeros,
    measure_whole_model,
    read_back,
    report_as_found,
    sparsity_now,
)
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.pruner import prune_as_asked
from wanda_lightning.model.language_model import find_model
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.offload import is_on_disk
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Pattern, Unstructured
from wanda_lightning.training.lora import without_adapters

if TYPE_CHECKING:
    from wanda_lightning.callbacks.pruning import PruningCallback

log = logging.getLogger(__name__)


class PruningRun:
    """The state of the weights of one run. It belongs to these weights: nothing is known about others.

    Args:
        callback: Says what is asked for.

    Attributes:
        results: The report and the evaluations.
        files: The files of the run while it goes on.
        pruned_at: The step of the schedule that was carried out last.
    """

    def __init__(self, callback: "PruningCallback") -> None:
        self.asked = callback
        self.results = RunReport()
        self.files = RunFiles(callback, self.results)
        self.pruned_at = -1

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors for a checkpoint."""
        return {**self.results.state_dict(), "pruned_at": self.pruned_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, also in an older version."""
        self.results.load_state_dict(state)
        self.pruned_at = state["pruned_at"]

    def is_pruned(self, model: nn.Module) -> bool:
        """Whether the report is of these weights. While pruned weights may regrow, zeros do not tell."""
        own = self.results
        return (self.regrows and own.report is not None) or own.is_of(model, self.asked.layers)

    def report_of(self, model: nn.Module) -> PruningReport | None:
        """Return what was pruned, by this run, or before it where the weights came with zeros."""
        if self.is_pruned(model):
            return self.results.report
        found, met = _look_at(model, self.asked)
        return found if _was_pruned(found, met) else None

    @property
    def regrows(self) -> bool:
        """Whether pruned weights are trained until the next pruning of the schedule."""
        schedule = self.asked.schedule
        return schedule is not None and schedule.regrow and self.pruned_at < schedule.end

    def stage(self, module: LightningModule) -> Stage:
        """Name the stage that the weights are in, by looking at them."""
        model = find_model(module)
        pruned, trained = self.is_pruned(model), self.results.trained > 0
        return stage_of(module, pruned, trained, not pruned and _was_pruned(*_look_at(model, self.asked)))

    def look_again(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin anew if the weights are others than those that were pruned."""
        if self.results.report is not None and not self.is_pruned(find_model(module)):
            self._forget(trainer)

    def prune(self, trainer: Trainer, module: LightningModule) -> None:
        """Prune the module's model unless it is pruned as asked for; a schedule prunes later."""
        model = find_model(module)
        refuse_sharded(model)
        with Processes().together(), without_adapters(model) as plain:
            if self.files.will_save and trainer.is_global_zero:
                check_can_be_saved(cast(Any, plain), getattr(module, "tokenizer", None))
        self.look_again(trainer, module)
        if self.asked.schedule is not None and self.results.report is not None:
            return
        found, met = _look_at(model, self.asked)
        if self.asked.schedule is not None:
            self.results.came_with_zeros = _was_pruned(found, met)
            return
        if self.results.report is not None:
            if met or self.results.report.settings == describe_settings(self.asked):
                return
            self._forget(trainer)
        if _was_pruned(found, met):
            self.results.came_with_zeros = True
            log.warning(
                "the model was pruned before: %.2f %% of the weights are zero, %.2f %% are asked for: %s",
                100 * found.sparsity,
                100 * self.asked.pattern.sparsity,
                "it is not pruned again" if met else "it is pruned further",
            )
        if met:
            found.whole_model_sparsity = measure_whole_model(model)
            self._take(found, trainer, module)
        else:
            self._prune_to(self.asked.pattern, trainer, module)

    def prune_gradually(self, trainer: Trainer, module: LightningModule) -> bool:
        """Prune if the schedule says so at this step, or at one that was skipped; a trial of the code is at the end."""
        schedule = self.asked.schedule
        step = schedule.end if schedule and cast(Any, trainer).fast_dev_run else trainer.global_step
        if schedule is None or (due := schedule.last_due(step)) is None or due <= self.pruned_at:
            return False
        if sparsity := schedule.sparsity(due, self.asked.pattern.sparsity):
            self._prune_to(Unstructured(sparsity), trainer, module, due)
        self.pruned_at = due
        return sparsity > 0

    def check_schedule(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse a schedule that ends after training does; begin it again if this is another training."""
        if self.pruned_at > trainer.global_step:
            self._forget(trainer)
        schedule = self.asked.schedule
        if schedule is not None and steps_are_known(trainer, module):
            schedule.check_steps(trainer.estimated_stepping_batches)

    def end_training(self, trainer: Trainer, module: LightningModule) -> None:
        """Warn if training ended before the schedule did."""
        schedule, report = self.asked.schedule, self.results.report
        if schedule is not None and self.pruned_at < schedule.end:
            model, layers = find_model(module), self.asked.layers
            if report is not None and self.regrows:
                report.linears = read_back(model, report, layers)
            now = sparsity_now(model, [(report, layers)] if report else [])
            log.warning(
                "training ended at step %d, the gradual schedule would at step %d: sparsity is %.2f %%, not %.2f %%",
                *(trainer.global_step, schedule.end, 100 * now, 100 * self.asked.pattern.sparsity),
            )

    def add_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Put the metrics of a validation into the report, under the stage that the weights are in."""
        self.look_again(trainer, module)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        said = samples_of(trainer, module, self.asked.prompts)
        self.results.add_evaluation(self.stage(module), metrics, said, trainer, self.asked.folder(trainer))

    def zeros_to_keep(self, model: nn.Module) -> tuple[Sequence[PrunableLinear], dict[str, Pattern] | None]:
        """Find the linears that have zeros to keep, and what they were pruned to, where that is known."""
        report, layers = self.results.report, self.asked.layers
        if self.regrows:
            return [], None
        if report is None or self.results.came_with_zeros:
            return linears_with_zeros(model, layers), None
        linears = linears_of(model, report, layers)
        if report.allocation is not None:
            return linears, patterns_of(report.allocation, linears)
        pattern = self.asked.pattern if self.asked.schedule is None else Unstructured(report.target_sparsity)
        return linears, allocate(linears, pattern, selection_of(self.asked, model).by_name)

    def _forget(self, trainer: Trainer) -> None:
        self.results.forget()
        self.pruned_at = -1
        self.files.forget_finished(trainer)

    def _prune_to(self, pattern: Pattern, trainer: Trainer, module: LightningModule, step: int = -1) -> None:
        asked, model, processes = self.asked, find_model(module), Processes()
        journal = self.files.open_layers(trainer, streamed=is_on_disk(model))
        settings = replace(pruning_settings(asked), pattern=pattern)
        forward = forward_of(trainer, module)
        # Outside of isolate_rng: a train dataloader that is made here draws what it would draw without pruning.
        batches = asked.calibration.of(trainer, forward is not None) if settings.asks_for_batches else None
        precision, copies = trainer.precision_plugin.forward_context(), copies_follow(trainer, module)
        steps = as_in_validation(module) if forward else nullcontext()
        with isolate_rng(), precision, copies, steps, noticing_sigterm() as asked_to_end:
            report = prune_as_asked(
                model,
                batches,
                settings,
                forward=forward,
                activations=asked.activations,
                journal=journal,
                processes=processes,
                progress=partial(progress, trainer, asked_to_end),
            )
        self.files.all_finished, self.pruned_at = True, step  # if it is cut off, it is still to be done
        report.calibration |= asked.calibration.describe(trainer)
        self._take(report, trainer, module)

    def _take(self, report: PruningReport, trainer: Trainer, module: LightningModule) -> None:
        """Take a new report, of the weights as they are now, and bring it to the loggers and to its folder."""
        report.model, report.settings = describe_model(module), describe_settings(self.asked)
        self.results.take(report, find_model(module), self.asked.layers)
        schedule = self.asked.schedule
        self.results.publish(trainer, self.asked.folder(trainer), schedule is None or self.pruned_at >= schedule.end)


def _look_at(model: nn.Module, asked: "PruningCallback") -> tuple[PruningReport, bool]:
    return report_as_found(model, asked.method, asked.pattern, selection_of(asked, model))


def _was_pruned(found: PruningReport, met: bool) -> bool:
    return met or found.sparsity >= NOTABLE
