"""A Hugging Face causal language model as a LightningModule."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from wanda_lightning.arguments import Dtype, instance_or_none
from wanda_lightning.callbacks.plumbing.loaders import datamodule_of
from wanda_lightning.callbacks.plumbing.samples import tokenizer_of
from wanda_lightning.callbacks.plumbing.settings_check import will_train
from wanda_lightning.callbacks.shape_pruning import shape_callbacks
from wanda_lightning.checkpoints.loading import load_model, load_streamed, load_tokenizer
from wanda_lightning.checkpoints.quiet import quiet_if_small, without_progress_bars
from wanda_lightning.evaluation import Perplexity
from wanda_lightning.model.next_tokens import inputs_and_labels
from wanda_lightning.report.shrinking import hidden_states_kept
from wanda_lightning.runs.checkpoint_shapes import take_shapes
from wanda_lightning.runs.teacher import check_teacher, load_teacher
from wanda_lightning.training.distillation import Distillation, Teacher
from wanda_lightning.training.lora import LoraSettings, add_adapters, has_adapters, merge_masked
from wanda_lightning.training.lr_schedulers import when_to_step

log = logging.getLogger(__name__)


class CausalLM(LightningModule):
    """Loads a causal language model, validates it by perplexity and fine-tunes it.

    Args:
        pretrained: A hub name, a local folder, or a ``.gguf`` file, which is de-quantised.
        dtype: Data type of the weights; ``auto`` takes the checkpoint's own.
        attn_implementation: Such as ``sdpa``, ``eager`` or ``flash_attention_2``. Default: transformers' choice.
        gradient_checkpointing: Trade time for memory in training.
        trust_remote_code: Run code that the model's author put on the hub.
        optimizer: Optimizer of all parameters, or of the adapters. Default: AdamW with a learning rate of 1e-5.
        lr_scheduler: Learning-rate scheduler, stepped after every optimizer step; ``ReduceLROnPlateau`` of
            ``lightning.pytorch.cli`` after every epoch.
        lora: Train low-rank adapters instead of the weights.
        distillation: Learn from the dense model too: from its predictions, and its hidden states.
        stream: Leave the decoder layers on disk and load them one at a time, to prune and evaluate models that are
            larger than memory; they cannot be trained.
        model_kwargs: More arguments of ``from_pretrained``.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Dtype = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lora: LoraSettings | None = None,
        distillation: Distillation | None = None,
        stream: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, str | Path):
            raise ValueError(f"pretrained must be a name or folder, got a {type(pretrained).__name__}: see prune_model")
        pretrained = str(pretrained)  # a path of pathlib would not be read from a checkpoint
        self.save_hyperparameters("pretrained")  # what a checkpoint needs to load; the rest is the run's to choose
        self.pretrained = pretrained
        self.gradient_checkpointing, self.trust_remote_code = gradient_checkpointing, trust_remote_code
        self.optimizer = optimizer or partial(torch.optim.AdamW, lr=1e-5)  # no lambda: it is pickled to be spawned
        self.lr_scheduler, self.lora, self.distillation, self.stream = lr_scheduler, lora, distillation, stream
        _check_settings(self)
        attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
        named = {"dtype": dtype, "trust_remote_code": trust_remote_code, **attention}
        self.model_kwargs: dict[str, Any] = {**named, **(model_kwargs or {})}
        self.model: Any = None
        self.tokenizer: Any = None
        self.perplexities = torch.nn.ModuleList([Perplexity()])  # one an evaluation set
        self.teacher: Teacher | None = None
        self.merged = False

    def configure_model(self) -> None:
        """Load the model; called by the Trainer before every run."""
        if self.model is not None:
            return
        if self.stream:
            self._open_streamed(self.pretrained)
        else:
            with quiet_if_small(self.pretrained):
                self.model = load_model(self.pretrained, **self.model_kwargs).train()
            if self.lora is not None:  # before the optimizer is made; pruning then sees through the adapters
                add_adapters(self.model, self.lora)
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable()
        self.tokenizer = _find_tokenizer(self)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the model first: processes that trained it send weights back to the one that started them."""
        self.configure_model()
        if any(".lora_A." in name for name in state_dict) and not has_adapters(self.model):
            raise ValueError("the checkpoint has adapters, and the model has none: give lora as in its run")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the model the shapes that the checkpoint has: that of a run which made it smaller says which."""
        take_shapes(self, checkpoint)

    def setup(self, stage: str) -> None:
        """Refuse what cannot be trained, before it is pruned; ``fit`` without training steps prunes it."""
        if stage == "fit" and will_train(self.trainer):
            self.check_trainable()

    def check_trainable(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ValueError: If the model is streamed from disk, or there is no such teacher, or it has another vocabulary.
        """
        _check_trainable(self)

    def forward(self, **inputs: Any) -> Any:
        """Call the model, without a cache."""
        return self.model(**inputs, use_cache=False)

    def on_validation_epoch_start(self) -> None:
        """Begin at zero, whatever an evaluation that was broken off, or in inference mode, has left."""
        for metric in self.perplexities:
            cast(Perplexity, metric).reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_train_start(self) -> None:
        """Load the teacher, if there is one."""
        if self.distillation is not None and self.teacher is None:
            reports = [callback.report for callback in shape_callbacks(self.trainer)]
            kept = hidden_states_kept(filter(None, reports))
            self.teacher = load_teacher(self.distillation, self.pretrained, kept, **self.model_kwargs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the next token, or what distillation makes of it."""
        inputs, labels_BT = inputs_and_labels(batch)
        teacher = self.teacher
        loss = teacher.loss(self, inputs, labels_BT) if teacher else self(**inputs, labels=labels_BT).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to ``val/perplexity`` and ``val/tokens``, each with ``/<name>`` if there are several sets."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to ``test/perplexity`` and ``test/tokens``, each with ``/<name>`` if there are several sets."""
        self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the logits of a batch, shape (B, T, V)."""
        return self(**inputs_and_labels(batch)[0]).logits

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the scheduler that were asked for.

        Returns:
            What Lightning takes from ``configure_optimizers``.

        Raises:
            ValueError: If the scheduler waits for a metric, and does not say which.
        """
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": when_to_step(self.lr_scheduler(optimizer))}

    def reopen(self, folder: str | Path) -> None:
        """Stream from the folder of a saved model from now on."""
        if self.stream:
            with without_progress_bars():
                self._open_streamed(str(folder))

    def _open_streamed(self, pretrained: str) -> None:
        self.model = load_streamed(pretrained, device=self.trainer.strategy.root_device, **self.model_kwargs)
        # DDP would send every weight to the other processes, also those that are on disk.
        self._ddp_params_and_buffers_to_ignore = [n for n, p in self.named_parameters() if p.is_meta]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the parts of the module, but not a streamed model, which is where it belongs."""
        if not self.stream:
            return super()._apply(fn, recurse)
        for child in self.children():
            if child is not self.model:
                child._apply(fn)
        return self

    def merge_adapters(self) -> None:
        """Add the adapters to the weights that are not zero, for good: (W + B A) * M."""
        merge_masked(self.model)
        self.merged = True

    def _evaluate(self, batch: dict[str, Tensor], stage: str, index: int) -> None:
        while len(self.perplexities) <= index:
            self.perplexities.append(Perplexity().to(self.device))
        metric = cast(Perplexity, self.perplexities[index])
        before = metric.tokens.clone()
        metric.update_from(self.model, *inputs_and_labels(batch))
        own = _name_of_set(self.trainer, index)
        log = partial(self.log, on_step=False, on_epoch=True, add_dataloader_idx=False)
        log(f"{stage}/perplexity{own}", metric, prog_bar=True, metric_attribute=f"perplexities.{index}")
        # Of how many predictions it is the mean: figures of more or less text do not compare.
        log(f"{stage}/tokens{own}", (metric.tokens - before).float(), reduce_fx="sum", sync_dist=True)


def _check_settings(module: CausalLM) -> None:
    if not callable(module.optimizer):
        raise ValueError(f"optimizer must be something like partial(AdamW, lr=1e-5), got {module.optimizer!r:.60}")
    instance_or_none("lora", module.lora, LoraSettings, "LoraSettings(rank=8)")
    instance_or_none("distillation", module.distillation, Distillation, "Distillation(alpha=0.5)")
    if module.stream and (module.lora or module.distillation or module.gradient_checkpointing):
        raise ValueError("a streamed model is not trained: leave out stream, or lora, distillation, checkpointing")


def _check_trainable(module: CausalLM) -> None:
    if module.stream:
        raise ValueError(
            "a model that is streamed from disk can be pruned and evaluated, not trained: use prune, and fit the "
            "saved model without stream"
        )
    check_teacher(module.distillation, module.pretrained, trust_remote_code=module.trust_remote_code)


def _find_tokenizer(module: CausalLM) -> Any:
    """Load the model's own tokenizer; where it has none, take the one that the datamodule was given."""
    try:
        return load_tokenizer(module.pretrained, trust_remote_code=module.trust_remote_code)
    except ValueError as error:
        if (given := tokenizer_of(module._trainer, module)) is None:
            log.warning("the model goes without a tokenizer: %s", error)  # who needs none need not have one
        return given


def _name_of_set(trainer: Any, index: int) -> str:
    """Name an evaluation set, behind a slash; one that is alone needs no name."""
    names = getattr(datamodule_of(trainer), "evaluation_names", None)
    are_several = len(trainer.num_test_batches if trainer.testing else trainer.num_val_batches) > 1
    own = names[index] if names else str(index) if are_several else ""
    return f"/{own}" if own else ""
