"""A Trainer that can also prune: evaluate, prune, evaluate, save."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from wanda_lightning.allocation.allocator import Allocator
from wanda_lightning.callbacks.pruning import PruningCallback, pruning_callbacks
from wanda_lightning.checkpoints.hub import check_can_push
from wanda_lightning.methods import PruningMethod
from wanda_lightning.methods.named import MethodName
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.report.shrinking import Shrinking
from wanda_lightning.runs.budget import budget_of
from wanda_lightning.runs.comparison import Comparison
from wanda_lightning.runs.model_folder import save_pretrained
from wanda_lightning.runs.one_shot import prune
from wanda_lightning.runs.search_result import SearchResult


class PruningTrainer(Trainer):
    """Lightning's Trainer, which can also prune, sweep and search.

    Args:
        *args: Of Lightning's Trainer.
        push_to_hub: Name of a repository on the model hub, such as ``me/model``: a model that is saved goes there too,
            with its card. It is made if needed, public unless the hub's settings say otherwise.
        **kwargs: Of Lightning's Trainer.

    Attributes:
        comparison: Of the last sweep.
        search_result: Of the last search.
        hub_url: Where the model is that was pushed last.
        push_failed: Whether the last push failed.

    Raises:
        ValueError: If there is a name but no token that the hub takes, or it is no name.
        ConnectionError: If the hub cannot be reached.
    """

    comparison: Comparison | None = None
    search_result: SearchResult | None = None
    hub_url: str | None = None
    push_failed = False

    def __init__(self, *args: Any, push_to_hub: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.push_to_hub = push_to_hub
        if push_to_hub is not None and self.is_global_zero:
            check_can_push(push_to_hub)

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
    ) -> PruningReport | Shrinking:
        """Prunes once, evaluates before and after, and saves the model; no training.

        Layers that are finished are kept on disk until the model is saved: after a crash the same call goes on there.

        A gradual schedule has nothing to prune before training: then this only evaluates, and refuses to save.

        Args:
            model: A LightningModule that holds a model of transformers, or any other that has lists of layers.
            datamodule: Has ``calibration_dataloader()``, and ``val_dataloader()`` to evaluate with.
            evaluate: Whether to validate before and after.
            save: Whether to save the pruned model, to ``model/`` beside the report.
            train_dataloaders: What to calibrate with where there is no datamodule: one or more iterables of batches, as
                ``fit`` takes them. The pruning callback's ``num_samples`` says how many sequences are used.
            val_dataloaders: What to evaluate with then. Without, and without the model's own, nothing is evaluated.

        Returns:
            The report of the first pruning callback; where there is none, what the callbacks that change shapes did.

        Raises:
            ValueError: If the Trainer has no pruning callback, or one that prunes during training, or the folder holds
                the results of another model or of other settings.
        """
        return prune(self, model, datamodule, evaluate, save, train_dataloaders, val_dataloaders)

    def sweep(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        methods: Sequence[PruningMethod | MethodName],
        sparsities: Sequence[float] = (0.5,),
        patterns: Sequence[str] = (),
        allocations: Sequence[Allocator] = (),
    ) -> Comparison:
        """Prunes with every method to every sparsity and pattern, each from the dense weights, and compares.

        The dense model is evaluated once, for all. Every run has a folder with its report in the Trainer's ``log_dir``;
        beside them stand the table and the picture of all, also of those that were done there before. Runs that are
        done already are not done again. A copy of the dense weights is kept in memory; pruned weights are not saved,
        and the model ends as the last run left it.

        Args:
            model: A LightningModule that holds a model of transformers, or any other that has lists of layers.
            datamodule: Has ``calibration_dataloader()`` and ``val_dataloader()``; None if the model has them.
            methods: Pruning methods, such as Wanda, or their names, such as ``wanda``.
            sparsities: Fractions of weights to prune, unstructured, each in [0, 1).
            patterns: N:M patterns besides, in quotes: ``"2:4"``.
            allocations: How sparsities are split among linears, such as ``OWL()``, besides pruning all alike.

        Returns:
            The comparison of all runs in the folder.

        Raises:
            ValueError: If nothing is asked for or logged, or a thing is asked for twice; if the folder holds another
                sweep; if matplotlib is not installed; or in a ``fast_dev_run``.
        """
        from wanda_lightning.runs.sweep import sweep

        self.comparison = sweep(self, model, datamodule, methods, sparsities, patterns, allocations)
        return self.comparison

    def search(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        max_perplexity_increase: float | None = None,
        max_bytes: float | None = None,
        metric: str | None = None,
        max_drop: float | None = None,
        max_rise: float | None = None,
        step: float = 0.01,
        held_out_windows: int = 32,
    ) -> SearchResult:
        """Finds the largest sparsity within a budget, prunes to it, evaluates and saves.

        The pruning callback's own sparsity is not used; all its other settings are, and what its allocation cannot
        split counts as over the budget. Each trial prunes from the dense weights, of which a copy is kept in memory,
        and is evaluated on held-out windows of the calibration source. The evaluation set is read in the end. After a
        crash the same call goes on behind the finished trials.

        Args:
            model: A LightningModule that holds a model of transformers, or any other that has lists of layers.
            datamodule: Has ``calibration_dataloader()``, ``held_out_dataloader(max_windows)`` and ``val_dataloader()``.
            max_perplexity_increase: By which fraction of the dense model's the perplexity may be higher, such as 0.05.
            max_bytes: How large the weights may be when they are compressed: the smallest sparsity is chosen then.
            metric: Another metric that validation logs, or the end of its name, such as ``mean/acc``.
            max_drop: How much lower than the dense model's that metric may be.
            max_rise: How much higher it may be, if lower is better.
            step: Sparsities are multiples of it, in (0, 0.5].
            held_out_windows: Evaluate trials on at most so many windows.

        Returns:
            The trials, what was found, and what it gives on the evaluation set.

        Raises:
            ValueError: If the budget cannot be met or is not one, there is not one pruning callback with an
                unstructured pattern, the metric is not logged, the folder holds another search, or in a
                ``fast_dev_run``.
        """
        from wanda_lightning.runs.search import search

        budget = budget_of(max_perplexity_increase, max_bytes, metric, max_drop, max_rise)
        self.search_result = search(self, model, datamodule, budget, step, held_out_windows)
        return self.search_result

    def save_pretrained(self, model: LightningModule) -> None:
        """Save the module's model, tokenizer and a model card to ``model/`` beside the report.

        That is in the ``output_dir`` of the pruning callback, else in the Trainer's ``log_dir``.
        Adapters are saved to ``adapter/``, beside the model that they were trained on; or, if the module's ``lora``
        says so, merged under the masks. A merged model is evaluated too if the trained one was, with the Trainer's
        datamodule. With ``push_to_hub`` the model goes to the hub, too; a push that fails is said, and loses nothing.

        Args:
            model: A LightningModule that holds a model of transformers, or any other that has lists of layers.

        Raises:
            RuntimeError: If weights that were zero in training no longer are, or the report is of other weights.
            ValueError: If adapters have been merged in another way.
        """
        save_pretrained(self, model)
