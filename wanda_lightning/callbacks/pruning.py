"""Pruning as a Lightning callback: prune once before training, keep the zeros while training, report."""

from copy import copy
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from wanda_lightning.allocation.allocator import Allocator
from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.arguments import plain
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.callbacks.plumbing.calibration_batches import CalibrationBatches
from wanda_lightning.callbacks.plumbing.pruning_run import PruningRun
from wanda_lightning.callbacks.plumbing.run_identity import describe_settings
from wanda_lightning.callbacks.plumbing.settings_check import check_apart, check_settings, will_train
from wanda_lightning.callbacks.sparse_finetuning import SparseFinetuning
from wanda_lightning.engine.measured_sparsity import sparsity_now
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.evaluation.generation import check_prompts
from wanda_lightning.methods import PruningMethod
from wanda_lightning.methods.named import as_method
from wanda_lightning.model.language_model import find_model
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Unstructured, parse_pattern
from wanda_lightning.training.masks import WeightMasks, masks_of


class PruningCallback(SparseFinetuning):
    """Prunes the model of a LightningModule once, before the first training step of ``fit``.

    ``validate`` and ``test`` never prune, nor does resuming a pruned run. Calibration batches come from the
    datamodule's (or module's) ``calibration_dataloader()`` where it has one, else from the train dataloader. Models
    other than language models run by the module's ``calibration_step``, or ``validation_step``. Training keeps the
    zeros. The report, ``pruning.json`` and ``pruning.md``, holds also what ``trainer.validate`` gave at each stage.

    A model may come with zeros of an earlier pruning. The log says so, and the report calls its first evaluation ``as
    loaded`` rather than ``dense``. Where it has all the zeros that are asked for, they are kept, and the report says
    that they were found. Where more is asked for, it is pruned further: zeros score lowest, so they go first. Methods
    that update weights before they choose among them, such as SparseGPT, may bring some back.

    Args:
        method: The pruning method, such as ``Wanda()``, or the name of one.
        sparsity: Fraction of weights to prune, in [0, 1). Default: 0.5, or what the N:M pattern says.
        pattern: ``unstructured``, or ``n:m`` to keep n of every m consecutive inputs (quoted in YAML: ``"2:4"``).
        targets: Shell-style patterns of the linears to prune, such as ``q_proj`` or ``model.layers.0.*``. Default: all.
        ignore: Patterns of linears to leave dense.
        allocation: Sparsities, or ``n:m``, of some linears by name pattern; or what splits it, such as ``OWL()``.
        layers: Name of the list of layers, such as ``model.layers``, where the rule for it fails, or of several.
        num_samples: How many sequences to take where calibration uses the train dataloader.
        output_dir: Folder of the report. Default: the Trainer's ``log_dir``.
        schedule: Prune gradually during training rather than once before it; unstructured patterns only.
        activations: Where the activations of the calibration set wait: on the ``device``, ``cpu`` or ``disk``.
        resume: Keep finished layers in ``unfinished/`` until the model is saved, and go on behind them if they are of
            this run. Default: in ``PruningTrainer.prune``; until ``fit`` ends with an ``output_dir``; when streaming.
        exact_error: Report exact reconstruction errors whatever the method; takes the time of SparseGPT.
        overwrite: Replace the results in the folder also if they are of another model or of other settings.
        true_sequential: Prune each linear behind those before it, in one pass. Default: where the memory suffices.
        reconstruction: Train what is kept of each layer: ``Reconstruction(epochs=3)``, in YAML ``{epochs: 3}``.
        prompts: Texts that the model continues in ``validate``, for the report; by default three, ``[]`` for none.
        dense_target: Prune, in place of each weight, one that makes up for what has been pruned before it.
        permute: Let the neurons of each MLP stand in an order in which an N:M pattern loses less.

    Raises:
        ValueError: If the settings contradict each other.
    """

    def __init__(
        self,
        method: PruningMethod | str,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        allocation: Allocator | dict[str, str | float] | None = None,  # a float first would read 2:4 as 124
        layers: str | list[str] | None = None,
        num_samples: int = 128,
        output_dir: str | None = None,
        schedule: Gradual | None = None,
        activations: Place = "device",
        resume: bool | None = None,
        exact_error: bool = False,
        overwrite: bool = False,
        true_sequential: bool | None = None,
        reconstruction: Reconstruction | None = None,
        prompts: list[str] | None = None,
        dense_target: bool = False,
        permute: bool = False,
    ) -> None:
        super().__init__(layers)
        self.method, self.pattern = as_method(method), parse_pattern(pattern, sparsity)
        self.calibration = CalibrationBatches(num_samples)
        self.schedule, self.targets, self.ignore, self.allocation = schedule, targets, ignore, plain(allocation)
        self.num_samples, self.output_dir = self.calibration.num_samples, output_dir
        self.activations, self.resume = activations, resume
        self.true_sequential, self.reconstruction, self.dense_target = true_sequential, reconstruction, dense_target
        self.exact_error, self.overwrite, self.prompts = exact_error, overwrite, check_prompts(prompts)
        self.permute, self.run = permute, PruningRun(self)
        check_settings(self)

    @property
    def report(self) -> PruningReport | None:
        """What was done to the weights that this callback saw last; None before they are pruned."""
        return self.run.results.report

    @property
    def evaluations(self) -> dict[str, dict[str, float]]:
        """Metrics of these weights by stage, such as ``dense`` and ``pruned``."""
        return self.run.results.evaluations

    @property
    @override
    def state_key(self) -> str:
        """Tell callbacks of different settings apart in a checkpoint; the schedule does not count and may change."""
        settings = describe_settings(self)
        return self._generate_state_key(**{key: settings[key] for key in settings if key != "schedule"})

    @property
    def _legacy_state_key(self) -> Any:  # where the checkpoints of older versions keep the state
        return self._generate_state_key(method=str(self.method), pattern=str(self.pattern), targets=self.targets)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, unless the strategy restores checkpoints only after this hook: then when training starts."""
        if self.schedule is not None and not will_train(trainer):
            raise ValueError("a gradual schedule prunes while a model trains, and this run has no training steps")
        check_apart(pruning_callbacks(trainer), find_model(pl_module))
        self.run.files.begin(trainer, pl_module)
        if not (trainer.strategy.restore_checkpoint_after_setup and will_train(trainer)):
            self.run.prune(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if that has not happened yet; keep the zeros from here on."""
        self.run.prune(trainer, pl_module)
        self.run.check_schedule(trainer, pl_module)
        super().on_train_start(trainer, pl_module)
        self._prune_gradually(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Remember that the weights are no longer as they were pruned; prune more if the schedule says so."""
        self.run.results.note_step(trainer, outputs)
        self._prune_gradually(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that every zero was kept, and say so if the schedule is not through."""
        super().on_train_end(trainer, pl_module)
        self.run.end_training(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the zeros again; forget the finished layers, unless they are wanted until the model is saved."""
        super().on_fit_end(trainer, pl_module)
        self.run.files.end_fit(trainer, pl_module)

    def prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the module's model unless it is pruned as asked for; a schedule prunes later."""
        self.run.prune(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity of the linears that were pruned, by this run or before it; only the first callback logs."""
        if self is pruning_callbacks(trainer)[0]:
            pl_module.log("sparsity", sparsity_of_run(trainer, pl_module), sync_dist=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the metrics of ``trainer.validate`` into the report, under the stage that the weights are in."""
        if trainer.state.fn == "validate":
            self.run.add_evaluation(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the results of earlier runs as they are, and let others go on with the layers that are finished."""
        super().on_exception(trainer, pl_module, exception)
        self.run.files.abandon()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know: the report of these weights, and how far the schedule is."""
        return self.run.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run that wrote the checkpoint."""
        self.run.load_state_dict(state_dict)

    @override
    def keep_zeros(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep from here on the zeros that were pruned, unless the schedule lets them grow back."""
        self._masks = WeightMasks({})  # two sets of masks at once would take twice the memory
        self.mask(trainer, pl_module, masks_of(*self.run.zeros_to_keep(find_model(pl_module))))

    def _prune_gradually(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.run.prune_gradually(trainer, pl_module):
            self.check()  # whatever the method: what was pruned before must have stayed so
            self.keep_zeros(trainer, pl_module)

    def folder(self, trainer: Trainer) -> Path:
        """Return where the files go, for the second callback of a folder ``pruning-2`` in it; each process must ask."""
        folder = Path(self.output_dir or trainer.log_dir or trainer.default_root_dir).expanduser()
        alike = [callback for callback in pruning_callbacks(trainer) if callback.output_dir == self.output_dir]
        number = alike.index(self) + 1 if self in alike else 1
        return folder if number == 1 else folder / f"pruning-{number}"


def at_sparsity(callback: PruningCallback, sparsity: float, output_dir: str) -> PruningCallback:
    """Make a callback that differs from another in its sparsity and its folder, and knows of no weights yet.

    Args:
        callback: The other; it prunes unstructured.
        sparsity: Fraction of weights to prune, in [0, 1).
        output_dir: Folder of its report.

    Returns:
        The new callback. It keeps no finished layers on disk, and continues no prompts.
    """
    other = copy(callback)
    other.pattern, other.output_dir, other.resume = Unstructured(sparsity), output_dir, False
    other.calibration, other.run = CalibrationBatches(callback.num_samples), PruningRun(other)
    other.prompts = []  # as in a sweep: nobody reads what each trial says
    return other


def pruning_callbacks(trainer: Trainer) -> list[PruningCallback]:
    """List the pruning callbacks of a Trainer."""
    return [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, PruningCallback)]


def run_folder(trainer: Trainer) -> Path:
    """Return where the files of a run go: report, model, zero-shot results; every process must ask for it."""
    callbacks = pruning_callbacks(trainer)
    return callbacks[0].folder(trainer) if callbacks else Path(trainer.log_dir or trainer.default_root_dir)


def sparsity_of_run(trainer: Trainer, module: LightningModule) -> float:
    """Measure the fraction of zeros in the linears of a Trainer's callbacks that were pruned; 0 before that."""
    model = find_model(module)
    reports = [(each.run.report_of(model), each.layers) for each in pruning_callbacks(trainer)]
    return sparsity_now(model, [(report, layers) for report, layers in reports if report is not None])
