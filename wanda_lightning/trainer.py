"""A Trainer that can also prune: evaluate, prune, evaluate, save."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from wanda_lightning.callbacks import PruningCallback
from wanda_lightning.decoder import causal_lm
from wanda_lightning.report import PruningReport
from wanda_lightning.saving import save_pretrained


class PruningTrainer(Trainer):
    """Lightning's Trainer with :meth:`prune`."""

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

        Args:
            model: A LightningModule that holds a Hugging Face causal language model.
            datamodule: Has ``calibration_dataloader()``, and ``val_dataloader()`` to evaluate with.
            evaluate: Whether to validate before and after.
            save: Whether to save the pruned model, to ``model/`` in the Trainer's ``log_dir``.

        Returns:
            The report of the pruning callback.

        Raises:
            ValueError: If the Trainer has no pruning callback.
        """
        callback = self.pruning_callback
        if callback is None:
            raise ValueError("nothing to prune with: give the Trainer a pruning callback such as WandaPruning")
        if evaluate:
            self.validate(model, datamodule=datamodule, verbose=False)
        with self._no_training():
            self.fit(model, datamodule=datamodule)
        if evaluate:
            self.validate(model, datamodule=datamodule, verbose=False)
        if save:
            self.save_pretrained(model)
        assert callback.report is not None
        return callback.report

    def save_pretrained(self, model: LightningModule) -> None:
        """Save the module's language model and tokenizer to ``model/`` in the ``log_dir``, for ``from_pretrained``."""
        folder = Path(self.log_dir or self.default_root_dir) / "model"
        if self.is_global_zero:
            save_pretrained(causal_lm(model), getattr(model, "tokenizer", None), folder)
        self.strategy.barrier("save_pretrained")

    @contextmanager
    def _no_training(self) -> Iterator[None]:
        """Make ``fit`` stop before the first training step, after ``on_fit_start``."""
        before = self.limit_train_batches, self.num_sanity_val_steps
        self.limit_train_batches, self.num_sanity_val_steps = 0, 0
        try:
            yield
        finally:
            self.limit_train_batches, self.num_sanity_val_steps = before
