"""Zero-shot tasks as part of validation."""

import logging
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from wanda_lightning.arguments import plain, whole_number
from wanda_lightning.atomic_files import write_text
from wanda_lightning.callbacks.plumbing.samples import tokenizer_of
from wanda_lightning.callbacks.pruning import pruning_callbacks, run_folder
from wanda_lightning.callbacks.shape_pruning import shape_callbacks, stage_of_shapes
from wanda_lightning.evaluation.tasks import DEFAULT_TASKS, TaskSet, load_tasks
from wanda_lightning.evaluation.zero_shot import ZeroShotResult, checked_settings, evaluate_zero_shot
from wanda_lightning.json_files import to_json
from wanda_lightning.model.language_model import find_language_model

log = logging.getLogger(__name__)


class ZeroShotEvaluation(Callback):
    """Evaluates the model in memory on tasks of lm-eval at the end of every validation; needs the extra ``[eval]``.

    Logs ``val/zero_shot/<task>/<metric>``, their standard errors as ``..._stderr``, and the mean over the tasks,
    ``val/zero_shot/mean/acc``. lm-eval's own results, with versions and seeds, go to ``zero_shot/`` beside the report
    of the pruning callback, else in the Trainer's ``log_dir``. The questions are split over the processes. Tasks are
    loaded when the run starts, so that one that cannot be had ends the run before anything is lost. Random state and
    training mode are left as they were. A ``fast_dev_run`` asks one question of each task, and writes no file.

    Args:
        tasks: Names of lm-eval's tasks, groups or tags, with wildcards; ``builtin_continuation`` needs no download.
            Default: the seven of the Wanda paper (boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge,
            openbookqa).
        num_fewshot: Examples in the prompt, at least 0; null takes each task's own number.
        limit: Questions of each task: the first so many, or a fraction in (0, 1). Default: all.
        batch_size: Sequences in a batch.
        add_special_tokens: Whether the tokenizer may add its special tokens, such as a first ``<s>``.
        include_path: Folder, or folders, of task YAMLs of your own, which come before lm-eval's.
        max_length: Tokens in a sequence, older ones are cut. Default: the model's limit.
        every_n_epochs: While training, evaluate in every so many epochs; 0 means not while training, only in
            ``validate``, so before and after pruning and at the end. Never in the sanity check.

    Raises:
        ValueError: If a value is out of range.

    Example::

        Trainer(callbacks=[WandaPruning(sparsity=0.5), ZeroShotEvaluation(["builtin_continuation"], limit=100)])
    """

    def __init__(
        self,
        tasks: list[str] = list(DEFAULT_TASKS),  # noqa: B006 (never changed; shown by --help)
        num_fewshot: int | None = 0,
        limit: int | float | None = None,
        batch_size: int = 8,
        add_special_tokens: bool = False,
        include_path: str | list[str] | None = None,
        max_length: int | None = None,
        every_n_epochs: int = 1,
    ) -> None:
        every_n_epochs = plain(every_n_epochs)
        whole_number("every_n_epochs", every_n_epochs, 0)
        self.tasks = tasks
        self.include_path = include_path
        self.every_n_epochs = every_n_epochs
        self.settings: dict[str, Any] = {
            **checked_settings(num_fewshot, limit, batch_size, max_length),
            "add_special_tokens": add_special_tokens,
        }
        self.result: ZeroShotResult | None = None
        self._loaded: TaskSet | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the tasks, once, before a model is loaded or pruned."""
        if self._loaded is None:
            given = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            if given is None and not hasattr(pl_module, "tokenizer"):
                raise ValueError(
                    f"zero-shot evaluation needs a tokenizer: {type(pl_module).__name__} has no attribute tokenizer"
                )
            self._loaded = load_tasks(self.tasks, self.include_path)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, and log the results with the other metrics of this validation."""
        if trainer.sanity_checking or not self._is_due(trainer):
            return
        self._evaluate(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, and log the results as ``test/zero_shot/...``."""
        self._evaluate(trainer, pl_module, "test")

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn == "validate":
            return True
        return self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        assert self._loaded is not None
        trial = bool(cast(Any, trainer).fast_dev_run)
        with trainer.precision_plugin.forward_context():
            self.result = evaluate_zero_shot(
                find_language_model(pl_module),
                _tokenizer(trainer, pl_module),
                self._loaded,
                progress=trainer.progress_bar_callback is not None,
                # Where weights are sharded, all processes must run the same batches.
                split=isinstance(trainer.strategy, DDPStrategy),
                **self.settings | ({"limit": 1} if trial else {}),
            )
        for name, value in self.result.metrics.items():
            pl_module.log(f"{prefix}/zero_shot/{name}", value, sync_dist=True)  # the same on all processes
        folder = run_folder(trainer)  # every process must ask for it
        details = to_json(self.result.details)
        file = folder / "zero_shot" / f"{_stage(trainer, pl_module)}.json"
        callbacks = pruning_callbacks(trainer)
        if callbacks:
            callbacks[0].run.results.write(file, lambda: write_text(file, details), trainer)
        elif trainer.is_global_zero and not trial:
            write_text(file, details)


def _stage(trainer: Trainer, pl_module: LightningModule) -> str:
    """Name the state that the weights are in, as the report does."""
    if trainer.state.fn == "fit":
        return f"step-{trainer.global_step}"
    if callbacks := pruning_callbacks(trainer):
        return callbacks[0].run.stage(pl_module)
    if shape_callbacks(trainer):
        return stage_of_shapes(trainer, pl_module)
    return "test" if trainer.testing else "validate"


def _tokenizer(trainer: Trainer, pl_module: LightningModule) -> Any:
    tokenizer = tokenizer_of(trainer, pl_module)
    if tokenizer is None:
        raise ValueError(f"zero-shot evaluation needs a tokenizer: {type(pl_module).__name__}.tokenizer is None")
    return tokenizer
