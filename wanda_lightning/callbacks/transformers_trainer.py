"""The zeros of a pruned model, kept in Hugging Face's Trainer."""

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from wanda_lightning.training.masks import WeightMasks, masks_of_decoder


class KeepZeros(TrainerCallback):
    """Keeps pruned weights at exactly zero in the ``Trainer`` of transformers, with any optimizer.

    What :class:`wanda_lightning.SparseFinetuning` is to Lightning: gradients of pruned weights are dropped, before they
    are accumulated and clipped, and the weights are zeroed after every optimizer step. The masks are taken from the
    zeros of the decoder's linears when training starts, after a checkpoint is restored. Under DDP every process does
    the same; FSDP and DeepSpeed are not tested. Where the Trainer warns that keys are missing in the checkpoint that it
    resumes from, as with fused experts, load the model from the checkpoint's folder first.

    Args:
        layers: Name of the list of decoder layers, such as ``model.layers``, where the rule for finding it fails.

    Raises:
        RuntimeError: When a checkpoint is saved or at the end of training, if a pruned weight is not zero.

    Example::

        Trainer(model, arguments, train_dataset=data, callbacks=[KeepZeros()]).train()
    """

    def __init__(self, layers: str | None = None) -> None:
        self.layers = layers
        self._masks = WeightMasks({})
        self._hooks: list[Any] = []

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Derive the masks; by now a checkpoint is restored."""
        self._forget_hooks()  # of a run that was interrupted
        self._masks = masks_of_decoder(kwargs["model"], self.layers)
        self._hooks = [_mask_gradient(weight, mask) for _, weight, mask in self._masks.masks if weight.requires_grad]

    @override
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo what momentum and weight decay did to pruned weights."""
        self._masks.mask_weights()

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make sure that every zero was kept."""
        self.check()

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that every zero was kept, and leave the model as it was found."""
        self._forget_hooks()
        self.check()

    def check(self) -> None:
        """Make sure that all zeros are where they were when training started.

        Raises:
            RuntimeError: If one is not, with the names of the linears.
        """
        self._masks.check()

    def _forget_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _mask_gradient(weight: nn.Parameter, mask: Tensor) -> Any:
    """Drop gradients as they come: the Trainer clips before it tells its callbacks that it is about to step."""
    return weight.register_hook(lambda gradient: gradient.where(mask, 0))
