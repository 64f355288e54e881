"""Fine-tuning that keeps the zeros of a pruned model."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from wanda_lightning.callbacks.plumbing.averages import averages
from wanda_lightning.callbacks.plumbing.optimizers import after_each_step, extrapolated
from wanda_lightning.callbacks.plumbing.process_group import leave_gloo_at_exit
from wanda_lightning.training.masks import WeightMasks, masks_of_decoder

log = logging.getLogger(__name__)


class SparseFinetuning(Callback):
    """Keeps pruned weights at exactly zero during training, with any optimizer.

    Gradients of pruned weights are dropped before clipping, and the weights are zeroed after every optimizer step.
    The masks are taken from the zeros of the model's linears when training starts, after a checkpoint is restored.
    Matrices that are zero as a whole, as in new blocks that change nothing yet, are trained like dense ones.
    Averages that Lightning's weight averaging callbacks keep are held to the same zeros. The pruning callbacks do all
    this by themselves; use this one to fine-tune a model that was pruned before.

    Works with DDP, and with FSDP2 (``ModelParallelStrategy`` and ``fully_shard``), where each process masks the shard
    it holds; the pruning itself needs whole weights. Lightning's older ``FSDPStrategy``, which flattens weights, and
    DeepSpeed are not tested.

    Args:
        layers: Name of the list of layers, such as ``model.layers``, where the rule for it fails, or of several.

    Raises:
        RuntimeError: When a checkpoint is saved or at the end of training, if a pruned weight is not zero.

    Example::

        Trainer(callbacks=[SparseFinetuning()]).fit(module, datamodule)
    """

    def __init__(self, layers: str | list[str] | None = None) -> None:
        self.layers = layers
        self._masks = WeightMasks({})
        self._hooks: list[Any] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer's process group in the end."""
        leave_gloo_at_exit()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Derive the masks; by now every strategy has restored its checkpoint."""
        self.keep_zeros(trainer, pl_module)
        self._hooks = [after_each_step(each, lambda: self._masks.mask_weights()) for each in trainer.optimizers]

    def keep_zeros(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep from here on the zeros that the decoder's linears have now."""
        self.mask(trainer, pl_module, masks_of_decoder(pl_module, self.layers))

    def mask(self, trainer: Trainer, pl_module: LightningModule, masks: WeightMasks) -> None:
        """Keep what is masked at zero from here on, also in averages of other callbacks and in points of optimizers.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            masks: Masks of some of its weights.
        """
        self._masks = masks
        for optimizer in trainer.optimizers:
            masks.mask_copies(extrapolated(optimizer))
        names = dict(pl_module.named_parameters())
        for average in averages(trainer):
            if not (copies := dict(average.named_parameters())):
                log.warning("a weight averaging callback averages nothing: it copied a module that had no model yet")
            masks.mask_copies({names[name]: copy for name, copy in copies.items() if name in names})

    def check(self) -> None:
        """Make sure that all zeros are where they were when training started, during training and after it.

        Raises:
            RuntimeError: If one is not, with the names of the linears.
        """
        self._masks.check()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the gradients of pruned weights before a module that steps by itself clips them."""
        if not pl_module.automatic_optimization:
            self._masks.mask_gradients()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of pruned weights: after accumulation and all-reduce, before clipping."""
        self._masks.mask_gradients()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make sure that no checkpoint of a model that lost its zeros is written."""
        self.check()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that every zero was kept."""
        self.check()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again: other callbacks may have put averaged weights in place when training ended."""
        self.check()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks; the masks stay, for checks of what is saved later."""
        self._forget_hooks()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks after an interrupted run, which is not torn down."""
        self._forget_hooks()

    def _forget_hooks(self) -> None:
        for end in self._hooks:
            end()
        self._hooks = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the hooks, which are the optimizers' and cannot be pickled."""
        return {**self.__dict__, "_hooks": []}
