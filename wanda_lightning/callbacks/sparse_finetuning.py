"""Fine-tuning that keeps the zeros of a pruned model."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from wanda_lightning.decoder import causal_lm, decoder_layers
from wanda_lightning.masks import WeightMasks


class SparseFinetuning(Callback):
    """Keeps pruned weights at exactly zero during training, with any optimizer.

    Gradients of pruned weights are dropped before clipping, and the weights are zeroed after every optimizer step.
    The masks are taken from the zeros of the decoder's linears when training starts, after a checkpoint is restored.
    The pruning callbacks do this by themselves; use this one to fine-tune a model that was pruned before.

    Raises:
        RuntimeError: At the end of training, if a pruned weight is not zero.

    Example::

        Trainer(callbacks=[SparseFinetuning()]).fit(module, datamodule)
    """

    def __init__(self) -> None:
        self._masks: WeightMasks | None = None
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Derive the masks; by now every strategy has restored its checkpoint."""
        layers = decoder_layers(causal_lm(pl_module), targets=["*"])
        self._masks = WeightMasks({linear.name: linear.weight for layer in layers for linear in layer.linears})
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_, masks=self._masks: masks.mask_weights())
            for optimizer in trainer.optimizers
        ]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of pruned weights: after accumulation and all-reduce, before clipping."""
        if self._masks is not None:
            self._masks.mask_gradients()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that every zero was kept."""
        if self._masks is not None:
            self._masks.check()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks, also after an interrupted run."""
        for hook in self._hooks:
            hook.remove()
        self._masks, self._hooks = None, []
