"""A Trainer that can also prune: evaluate, prune, evaluate, save."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from wanda_lightning.atomic_files import write_text
from wanda_lightning.callbacks import PruningCallback, SparseFinetuning
from wanda_lightning.checkpoints.saving import save_pretrained
from wanda_lightning.methods import PruningMethod
from wanda_lightning.model.language_model import find_language_model
from wanda_lightning.model.offload import is_on_disk
from wanda_lightning.report.model_card import Training, model_card
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.runs.comparison import Comparison
from wanda_lightning.training.lora import has_adapters, save_adapter, without_adapters


class PruningTrainer(Trainer):
    """Lightning's Trainer, which can also prune and sweep."""

    comparison: Comparison | None = None
    will_save = False  # the pruning callback then refuses a model that cannot be saved before it prunes

    @property
    def pruning_callback(self) -> PruningCallback | None:
        """The pruning callback of this Trainer, if it has one."""
        return next((c for c in cast(Any, self).callbacks if isinstance(c, PruningCallback)), None)

    def prune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        evaluate: bool = True,
        save: bool = True,
    ) -> PruningReport:
        """Prunes once, evaluates before and after, and saves the model; no training.

        Layers that are finished are kept on disk until the model is saved: after a crash the same call goes on there.

        A gradual schedule has nothing to prune before training: then this only evaluates, and refuses to save.

        Args:
            model: A LightningModule that holds a Hugging Face causal language model.
            datamodule: Has ``calibration_dataloader()``, and ``val_dataloader()`` to evaluate with.
            evaluate: Whether to validate before and after.
            save: Whether to save the pruned model, to ``model/`` in the Trainer's ``log_dir``.

        Returns:
            The report of the pruning callback.

        Raises:
            ValueError: If the Trainer has no pruning callback, or one that prunes during training.
        """
        callback = self.pruning_callback
        if callback is None:
            raise ValueError(
                "nothing to prune with: give the Trainer a pruning callback such as WandaPruning; on the command line "
                "a recipe has one, such as -c wanda"
            )
        if callback.schedule is not None and save:
            raise ValueError("a gradual schedule prunes while a model trains: use fit, or leave the schedule out")
        self.will_save |= save
        if callback.resume is None:
            callback.resume = True  # until the model is saved
        if callback.report is None:
            callback.open_journal(self)  # before anything is written to the folder
        if evaluate:
            self.validate(model, datamodule=datamodule, verbose=False)
            self._end_if_asked()
        if callback.schedule is not None:
            return PruningReport(str(callback.method), str(callback.pattern), callback.pattern.sparsity)
        with self._no_training():
            self.fit(model, datamodule=datamodule)
        if evaluate:
            self.validate(model, datamodule=datamodule, verbose=False)
            self._end_if_asked()
        if save:
            self.save_pretrained(model)
        assert callback.report is not None
        return callback.report

    def sweep(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        methods: Sequence[PruningMethod],
        sparsities: Sequence[float] = (0.5,),
        patterns: Sequence[str] = (),
    ) -> Comparison:
        """Prunes with every method to every sparsity and pattern, each from the dense weights, and compares.

        The dense model is evaluated once, for all. Every run has a folder with its report in the Trainer's ``log_dir``;
        beside them stand the table and the picture of all. Runs that are done already are not done again. A copy of the
        dense weights is kept in memory; pruned weights are not saved, and the model ends as the last run left it.

        Args:
            model: A LightningModule that holds a Hugging Face causal language model.
            datamodule: Has ``calibration_dataloader()`` and ``val_dataloader()``; None if the model has them.
            methods: Pruning methods, such as Wanda.
            sparsities: Fractions of weights to prune, unstructured, each in [0, 1).
            patterns: N:M patterns besides, in quotes: ``"2:4"``.

        Returns:
            The comparison of all runs.

        Raises:
            ValueError: If nothing or a thing twice is asked for, the folder holds another sweep, or matplotlib is not
                installed.
        """
        from wanda_lightning.runs.sweep import sweep

        self.comparison = sweep(self, model, datamodule, methods, sparsities, patterns)
        return self.comparison

    def save_pretrained(self, model: LightningModule) -> None:
        """Save the module's language model, tokenizer and a model card to ``model/`` in the ``log_dir``.

        Adapters are saved to ``adapter/``, beside the model that they were trained on; or, if the module's ``lora``
        says so, merged under the masks. A merged model is evaluated too if the trained one was.

        Args:
            model: A LightningModule that holds a Hugging Face causal language model.

        Raises:
            RuntimeError: If weights that were zero in training no longer are.
            ValueError: If adapters have been merged in another way.
        """
        for callback in cast(Any, self).callbacks:
            if isinstance(callback, SparseFinetuning):
                callback.check()
        if getattr(getattr(model, "lora", None), "merge", "none") == "masked":
            self._merge(cast(Any, model))
        folder = Path(self.log_dir or self.default_root_dir)
        language_model: Any = find_language_model(model)
        pruning = self.pruning_callback
        if self.is_global_zero:
            tokenizer = getattr(model, "tokenizer", None)
            with without_adapters(language_model) as plain:
                save_pretrained(cast(Any, plain), tokenizer, folder / "model")
            if pruning is not None and pruning.report is not None:
                base = getattr(model.hparams, "pretrained", None)
                card = model_card(pruning.report, base, self._training(model), self.global_step)
                write_text(folder / "model/README.md", card)
            if has_adapters(language_model):
                save_adapter(language_model, folder / "adapter", base=(folder / "model").resolve())
        self.strategy.barrier("save_pretrained")
        if reopen := cast(Any, getattr(model, "reopen", None)):
            reopen(folder / "model")
        if pruning is not None and (reopen or not is_on_disk(language_model)):
            pruning.forget_layers(self)

    def _training(self, model: LightningModule) -> Training:
        if not self.global_step:
            return "none"
        if getattr(model, "merged", False):
            return "merged"
        if has_adapters(model):
            return "adapter"
        return "whole" if self.pruning_callback is None or self.pruning_callback.schedule is None else "gradual"

    def _merge(self, model: Any) -> None:
        if model.merged:
            return
        model.merge_adapters()
        callback, datamodule = self.pruning_callback, getattr(self, "datamodule", None)
        if callback is not None and "fine-tuned" in callback.evaluations and datamodule is not None:
            self.validate(model, datamodule=datamodule, verbose=False)

    def _end_if_asked(self) -> None:
        """End after a SIGTERM that came during the last batch; the next run would forget about it."""
        if self.strategy.reduce_boolean_decision(self.received_sigterm, all=False):
            raise SIGTERMException(143)

    @contextmanager
    def _no_training(self) -> Iterator[None]:
        """Make ``fit`` stop before the first training step, after ``on_fit_start``."""
        before = self.limit_train_batches, self.num_sanity_val_steps
        self.limit_train_batches, self.num_sanity_val_steps = 0, 0
        try:
            yield
        finally:
            self.limit_train_batches, self.num_sanity_val_steps = before
