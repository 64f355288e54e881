"""Pruning as a Lightning callback: prune once before training, keep the zeros while training, report."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.callbacks.plumbing.calibration_batches import CalibrationBatches
from wanda_lightning.callbacks.plumbing.progress import noticing_sigterm, progress
from wanda_lightning.callbacks.plumbing.report_logging import log_evaluation, log_report, log_totals
from wanda_lightning.callbacks.sparse_finetuning import SparseFinetuning
from wanda_lightning.checkpoints.saving_check import check_can_be_saved
from wanda_lightning.engine.checks import refuse_sharded
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.measured_sparsity import NOTABLE, report_as_found, sparsity_now
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import PruningMethod
from wanda_lightning.model.language_model import find_language_model
from wanda_lightning.model.names import name_without_adapters
from wanda_lightning.model.offload import is_on_disk
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Pattern, Unstructured, parse_pattern
from wanda_lightning.training.lora import without_adapters

log = logging.getLogger(__name__)


class PruningCallback(SparseFinetuning):
    """Prunes the language model of a LightningModule once, before the first training step of ``fit``.

    ``validate`` and ``test`` never prune; resuming from a checkpoint of a pruned run does not prune again. Calibration
    batches come from the datamodule's (or module's) ``calibration_dataloader()`` where it has one, else from the train
    dataloader. The zeros are kept during the training that follows. The report, ``pruning.json`` and ``pruning.md``,
    holds also what ``trainer.validate`` gave before the pruning, after it, and after training.

    A model may come with zeros, loaded from a folder or checkpoint of an earlier pruning. The log says so, and the
    report calls its first evaluation ``as loaded`` rather than ``dense``. Where it has all the zeros that are asked
    for, it is not pruned again: the zeros are kept, and the report says that they were found. Where more is asked for,
    it is pruned further: zeros score lowest, so they go first.

    With a schedule the model is pruned in several steps while it trains, each time with new statistics.

    Args:
        method: The pruning method.
        sparsity: Fraction of weights to prune, in [0, 1). Default: 0.5, or what the N:M pattern says.
        pattern: ``unstructured``, or ``n:m`` to keep n of every m consecutive inputs (quoted in YAML: ``"2:4"``).
        targets: Shell-style patterns of the linears to prune, such as ``q_proj`` or ``model.layers.0.*``. Default: all.
        ignore: Patterns of linears to leave dense.
        allocation: Sparsities, or ``n:m``, of linears by name pattern, where not all are to be pruned alike.
        layers: Name of the list of decoder layers, such as ``model.layers``, where the rule for finding it fails.
        num_samples: How many sequences to take where calibration uses the train dataloader.
        output_dir: Folder of the report. Default: the Trainer's ``log_dir``.
        schedule: Prune gradually during training rather than once before it; unstructured patterns only.
        activations: Where the activations of the calibration set wait between two layers: ``device``, ``cpu`` or
            ``disk``.
        resume: Keep every finished layer in ``unfinished/`` of the folder until the model is saved, and go on behind
            them if they are of this very run. Default: in ``PruningTrainer.prune``, and where ``output_dir`` is given
            until ``fit`` ends. Models that are streamed from disk have that folder in any case.
        exact_error: Report exact reconstruction errors whatever the method; takes the time of SparseGPT.

    Raises:
        ValueError: If the settings contradict each other.
    """

    def __init__(
        self,
        method: PruningMethod,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        allocation: dict[str, float | str] | None = None,
        layers: str | None = None,
        num_samples: int = 128,
        output_dir: str | None = None,
        schedule: Gradual | None = None,
        activations: Place = "device",
        resume: bool | None = None,
        exact_error: bool = False,
    ) -> None:
        super().__init__(layers)
        self.method = method
        self.pattern = parse_pattern(pattern, sparsity)
        self.method.check(self.pattern)
        self.calibration = CalibrationBatches(num_samples)
        if schedule is not None:
            schedule.check(method, self.pattern, allocation)
        self.schedule = schedule
        self.targets, self.ignore, self.allocation = targets, ignore, allocation
        self.num_samples, self.output_dir = num_samples, output_dir
        self.activations, self.resume = activations, resume
        self.journal: Journal | None = None
        self.exact_error = exact_error
        self.report: PruningReport | None = None
        self.evaluations: dict[str, dict[str, float]] = {}
        self._trained = False
        self._pruned_at = -1  # the step of the schedule that was carried out last

    @property
    def state_key(self) -> str:
        """Tell callbacks of different settings apart in a checkpoint."""
        return self._generate_state_key(method=str(self.method), pattern=str(self.pattern), targets=self.targets)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, unless the strategy restores checkpoints only after this hook: then when training starts."""
        trains = trainer.limit_train_batches != 0 and 0 not in (trainer.max_epochs, trainer.max_steps)
        if self.schedule is not None and not trains:
            raise ValueError("a gradual schedule prunes while a model trains, and this run has no training steps")
        if not (trainer.strategy.restore_checkpoint_after_setup and trains):
            self.prune(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if that has not happened yet; keep the zeros from here on."""
        self.prune(trainer, pl_module)
        super().on_train_start(trainer, pl_module)
        if self.schedule is not None:
            steps = trainer.estimated_stepping_batches  # of modules that step by themselves it cannot know
            if pl_module.automatic_optimization and steps < self.schedule.end:
                raise ValueError(f"the gradual schedule ends at step {self.schedule.end}, training at step {steps:g}")
            self._prune_gradually(trainer, pl_module)

    def prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the module's model, once; a second call does nothing, and a schedule prunes later."""
        if self.report is not None:
            return
        model = find_language_model(pl_module)
        refuse_sharded(model)
        if getattr(trainer, "will_save", False):
            with without_adapters(model) as plain:
                check_can_be_saved(cast(Any, plain), getattr(pl_module, "tokenizer", None))
        if self.schedule is not None:
            return
        found, met = report_as_found(
            model, self.method, self.pattern, self.targets, self.ignore, self.layers, self.allocation
        )
        if met or found.sparsity >= NOTABLE:
            log.warning(
                "the model was pruned before: %.2f %% of the weights are zero, %.2f %% are asked for: %s",
                100 * found.sparsity,
                100 * self.pattern.sparsity,
                "it is not pruned again" if met else "it is pruned further",
            )
            if "dense" in self.evaluations:
                self.evaluations["as loaded"] = self.evaluations.pop("dense")
        if met:
            self.report = found
            self._publish(trainer)
        else:
            self._prune_to(self.pattern, trainer, pl_module)

    def keep_zeros(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep from here on the zeros that the decoder's linears have now, unless the schedule lets them grow back."""
        self._masks = None
        if self.schedule is None or not self.schedule.regrow or self._pruned_at >= self.schedule.end:
            super().keep_zeros(trainer, pl_module)

    def _prune_gradually(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if the schedule says so at this step; a step that was passed over is made up for."""
        due = self.schedule.last_due(trainer.global_step) if self.schedule is not None else None
        if self.schedule is None or due is None or due <= self._pruned_at:
            return
        self._pruned_at = due
        if sparsity := self.schedule.sparsity(due, self.pattern.sparsity):
            self._prune_to(Unstructured(sparsity), trainer, pl_module)
            self.check()  # whatever the method: what was pruned before must have stayed so
            self.keep_zeros(trainer, pl_module)

    def _prune_to(self, pattern: Pattern, trainer: Trainer, pl_module: LightningModule) -> None:
        model = find_language_model(pl_module)
        processes = Processes()
        with processes.together():
            self.open_journal(trainer, streamed=is_on_disk(model))
        with isolate_rng(), trainer.precision_plugin.forward_context(), noticing_sigterm() as asked_to_end:
            self.report = prune_model(
                model,
                self.calibration.of(trainer) if self.method.statistic or self.exact_error else None,
                self.method,
                pattern,
                targets=self.targets,
                ignore=self.ignore,
                layers=self.layers,
                allocation=self.allocation,
                exact_error=self.exact_error,
                activations=self.activations,
                journal=self.journal,
                processes=processes,
                progress=partial(progress, trainer, asked_to_end),
            )
        self.report.calibration |= self.calibration.describe(trainer)
        self._publish(trainer)

    def open_journal(self, trainer: Trainer, streamed: bool = False) -> None:
        """Keep other runs out of the folder from now on, if finished layers are to be kept there."""
        wanted = self.output_dir is not None if self.resume is None else self.resume
        if self.schedule is not None or not (wanted or streamed or self.resume is False):
            return
        journal = Journal(self._folder(trainer) / "unfinished")
        if trainer.is_global_zero:
            (journal.lock if wanted else journal.remove)()  # what is there is of an earlier run
        self.journal = journal if wanted or streamed else None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let others go on with what is finished."""
        if self.journal is not None:
            self.journal.release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the zeros again; forget the finished layers, unless they are wanted until the model is saved."""
        super().on_fit_end(trainer, pl_module)
        if self.resume is None and not is_on_disk(find_language_model(pl_module)):
            self.forget_layers(trainer)

    def forget_layers(self, trainer: Trainer) -> None:
        """Delete the finished layers on disk: the model is saved, or nobody asked for them."""
        if self.journal is not None and trainer.is_global_zero:
            self.journal.remove()
        self.journal = None

    def _publish(self, trainer: Trainer) -> None:
        """Bring a new report to the loggers and to its folder."""
        assert self.report is not None
        self.report.linears = [replace(row, name=name_without_adapters(row.name)) for row in self.report.linears]
        self.report.evaluations = self.evaluations
        self.report.magnitudes = {
            name_without_adapters(kind): counts for kind, counts in self.report.magnitudes.items()
        }
        through = self.schedule is None or self._pruned_at >= self.schedule.end
        (log_report if through else log_totals)(self.report, trainer)
        self._write_report(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Remember that the weights are no longer as they were pruned; prune more if the schedule says so."""
        self._trained = True
        self._prune_gradually(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that every zero was kept, and say so if the schedule is not through."""
        super().on_train_end(trainer, pl_module)
        if self.schedule is not None and self._pruned_at < self.schedule.end:
            log.warning(
                "training ended at step %d, the gradual schedule would at step %d: sparsity is %.2f %%, not %.2f %%",
                trainer.global_step,
                self.schedule.end,
                100 * sparsity_now(find_language_model(pl_module), self.report, self.layers),
                100 * self.pattern.sparsity,
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity of the linears that were pruned, 0 before that."""
        pl_module.log(
            "sparsity", sparsity_now(find_language_model(pl_module), self.report, self.layers), sync_dist=True
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the metrics of ``trainer.validate`` into the report, under the stage that the weights are in."""
        if trainer.state.fn == "validate":
            stage = "dense" if self.report is None else "fine-tuned" if self._trained else "pruned"
            stage = "merged" if getattr(pl_module, "merged", False) else stage  # with adapters: see CausalLM.lora
            self.evaluations[stage] = {name: float(value) for name, value in trainer.callback_metrics.items()}
            if self.report is not None:
                log_evaluation(self.report, stage, trainer)
            self._write_report(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know: that the weights are pruned, and the report."""
        report = self.report.to_dict() if self.report else None
        return {
            "report": report,
            "evaluations": self.evaluations,
            "trained": self._trained,
            "pruned_at": self._pruned_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run that wrote the checkpoint."""
        self.evaluations = state_dict["evaluations"]
        self._trained = state_dict["trained"]
        self._pruned_at = state_dict["pruned_at"]
        if state_dict["report"]:
            self.report = PruningReport.from_dict(state_dict["report"])
            self.report.evaluations = self.evaluations

    def _write_report(self, trainer: Trainer) -> None:
        folder = self._folder(trainer)  # every process must ask for it
        if self.report is not None and trainer.is_global_zero:
            self.report.save(folder)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.output_dir or trainer.log_dir or trainer.default_root_dir)
