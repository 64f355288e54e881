"""Pruning as a Lightning callback: prune once before training, keep the zeros while training, report."""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from wanda_lightning.callbacks.sparse_finetuning import SparseFinetuning
from wanda_lightning.decoder import causal_lm
from wanda_lightning.methods import PruningMethod
from wanda_lightning.pruner import prune_model
from wanda_lightning.report import PruningReport
from wanda_lightning.sparsity import parse_pattern, sparsity_of

log = logging.getLogger(__name__)


class PruningCallback(SparseFinetuning):
    """Prunes the language model of a LightningModule once, before the first training step of ``fit``.

    ``validate`` and ``test`` never prune; resuming from a checkpoint of a pruned run does not prune again. Calibration
    batches come from the datamodule's (or module's) ``calibration_dataloader()`` where it has one, else from the train
    dataloader. The zeros are kept during the training that follows. The report, ``pruning.json`` and ``pruning.md``,
    holds also what ``trainer.validate`` gave before the pruning, after it, and after training.

    Args:
        method: The pruning method.
        sparsity: Fraction of weights to prune, in [0, 1). Default: 0.5, or what the N:M pattern says.
        pattern: ``unstructured``, or ``n:m`` to keep n of every m consecutive inputs (quoted in YAML: ``"2:4"``).
        targets: Shell-style patterns of the linears to prune, such as ``q_proj`` or ``model.layers.0.*``. Default: all.
        ignore: Patterns of linears to leave dense.
        num_samples: How many sequences to take where calibration uses the train dataloader.
        output_dir: Folder of the report. Default: the Trainer's ``log_dir``.

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
        num_samples: int = 128,
        output_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.pattern = parse_pattern(pattern, sparsity)
        self.method.check(self.pattern)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.targets = targets
        self.ignore = ignore
        self.num_samples = num_samples
        self.output_dir = output_dir
        self.report: PruningReport | None = None
        self.evaluations: dict[str, dict[str, float]] = {}
        self._trained = False

    @property
    def state_key(self) -> str:
        """Tell callbacks of different settings apart in a checkpoint."""
        return self._generate_state_key(method=str(self.method), pattern=str(self.pattern), targets=self.targets)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, unless the strategy restores checkpoints only after this hook: then when training starts."""
        trains = trainer.limit_train_batches != 0 and 0 not in (trainer.max_epochs, trainer.max_steps)
        if not (trainer.strategy.restore_checkpoint_after_setup and trains):
            self.prune(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if that has not happened yet; keep the zeros from here on."""
        self.prune(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the module's model, once; a second call does nothing."""
        if self.report is not None:
            return
        model = causal_lm(pl_module)
        with isolate_rng(), trainer.precision_plugin.forward_context():
            self.report = prune_model(
                model,
                self._calibration_batches(trainer) if self.method.statistic else None,
                self.method,
                self.pattern,
                targets=self.targets,
                ignore=self.ignore,
                sum_over_ranks=partial(trainer.strategy.reduce, reduce_op="sum") if trainer.world_size > 1 else None,
                progress=_progress_bar if trainer.progress_bar_callback and trainer.is_global_zero else None,
            )
        self.report.evaluations = self.evaluations
        describe = getattr(_datamodule(trainer), "describe", None)
        self.report.calibration |= describe() if describe else {}
        for logger in trainer.loggers:
            logger.log_metrics({"sparsity": self.report.sparsity}, step=trainer.global_step)
        self._write_report(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Remember that the weights are no longer as they were pruned."""
        self._trained = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity of the linears that were pruned, 0 before that."""
        pl_module.log("sparsity", self._measured_sparsity(pl_module), sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the metrics of ``trainer.validate`` into the report, under the stage that the weights are in."""
        if trainer.state.fn == "validate":
            stage = "dense" if self.report is None else "fine-tuned" if self._trained else "pruned"
            self.evaluations[stage] = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._write_report(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know: that the weights are pruned, and the report."""
        report = self.report.to_dict() if self.report else None
        return {"report": report, "evaluations": self.evaluations, "trained": self._trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run that wrote the checkpoint."""
        self.evaluations = state_dict["evaluations"]
        self._trained = state_dict["trained"]
        if state_dict["report"]:
            self.report = PruningReport.from_dict(state_dict["report"])
            self.report.evaluations = self.evaluations

    def _calibration_batches(self, trainer: Trainer) -> Iterator[Any]:
        """Yield this process's share of the calibration batches."""
        for source in (_datamodule(trainer), trainer.lightning_module):
            if hasattr(source, "calibration_dataloader"):
                batches = cast(Any, source).calibration_dataloader()
                return islice(iter(batches), trainer.global_rank, None, trainer.world_size)
        trainer.fit_loop.setup_data()  # the train dataloader is otherwise made later; distributed ones are sharded here
        return _first_sequences(cast(Any, trainer.train_dataloader), -(-self.num_samples // trainer.world_size))

    def _measured_sparsity(self, pl_module: LightningModule) -> float:
        if self.report is None:
            return 0.0
        modules = dict(causal_lm(pl_module).named_modules())
        weights = [cast(Any, modules[row.name]).weight for row in self.report.linears]
        zeros = sum(sparsity_of(weight) * weight.numel() for weight in weights)
        return zeros / sum(weight.numel() for weight in weights)

    def _write_report(self, trainer: Trainer) -> None:
        folder = self.output_dir or trainer.log_dir or trainer.default_root_dir
        if self.report is not None and trainer.is_global_zero:
            self.report.save(Path(folder))


def _first_sequences(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield whole batches until they hold ``count`` sequences."""
    for batch in batches:
        if count <= 0:
            return
        yield batch
        ids = batch["input_ids"] if isinstance(batch, dict) else batch
        count -= len(ids) if isinstance(ids, torch.Tensor) else len(ids[0])


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _progress_bar(layers: Iterable[Any], total: int) -> Iterable[Any]:
    from rich.progress import track

    return track(layers, description="Pruning", total=total)
