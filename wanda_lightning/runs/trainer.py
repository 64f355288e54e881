"""A Trainer that can also prune: evaluate, prune, evaluate, save."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from wanda_lightning.callbacks.pruning import PruningCallback, pruning_callbacks
from wanda_lightning.methods import PruningMethod
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.runs.comparison import Comparison
from wanda_lightning.runs.model_folder import save_pretrained
from wanda_lightning.runs.one_shot import prune


class PruningTrainer(Trainer):
    """Lightning's Trainer, which can also prune and sweep."""

    comparison: Comparison | None = None

    @property
    def pruning_callback(self) -> PruningCallback | None:
        """The first pruning callback of this Trainer; None if there is none."""
        return next(iter(pruning_callbacks(self)), None)

    def prune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        evaluate: bool = True,
        save: bool = True,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
    ) -> PruningReport:
        """Prunes once, evaluates before and after, and saves the model; no training.

        Layers that are finished are kept on disk until the model is saved: after a crash the same call goes on there.

        A gradual schedule has nothing to prune before training: then this only evaluates, and refuses to save.

        Args:
            model: A LightningModule that holds a Hugging Face causal language model.
            datamodule: Has ``calibration_dataloader()``, and ``val_dataloader()`` to evaluate with.
            evaluate: Whether to validate before and after.
            save: Whether to save the pruned model, to ``model/`` beside the report.
            train_dataloaders: What to calibrate with where there is no datamodule: one or more iterables of batches, as
                ``fit`` takes them. The pruning callback's ``num_samples`` says how many sequences are used.
            val_dataloaders: What to evaluate with then. Without, and without the model's own, nothing is evaluated.

        Returns:
            The report of the first pruning callback.

        Raises:
            ValueError: If the Trainer has no pruning callback, or one that prunes during training, or the folder holds
                the results of another model or of other settings.
        """
        return prune(self, model, datamodule, evaluate, save, train_dataloaders, val_dataloaders)

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
            ValueError: If nothing is asked for, or a thing twice; if the folder holds another sweep; or if matplotlib
                is not installed.
        """
        from wanda_lightning.runs.sweep import sweep

        self.comparison = sweep(self, model, datamodule, methods, sparsities, patterns)
        return self.comparison

    def save_pretrained(self, model: LightningModule) -> None:
        """Save the module's model, tokenizer and a model card to ``model/`` beside the report.

        That is in the ``output_dir`` of the pruning callback, else in the Trainer's ``log_dir``.
        Adapters are saved to ``adapter/``, beside the model that they were trained on; or, if the module's ``lora``
        says so, merged under the masks. A merged model is evaluated too if the trained one was.

        Args:
            model: A LightningModule that holds a Hugging Face causal language model.

        Raises:
            RuntimeError: If weights that were zero in training no longer are, or the report is of other weights.
            ValueError: If adapters have been merged in another way.
        """
        save_pretrained(self, model)
