"""A Hugging Face causal language model as a LightningModule."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from wanda_lightning.evaluation import Perplexity
from wanda_lightning.loading import load_model, load_tokenizer


class CausalLM(LightningModule):
    """Loads a causal language model, validates it by perplexity and fine-tunes it.

    Args:
        pretrained: A hub name, a local folder, or a ``.gguf`` file, which is de-quantised.
        dtype: Data type of the weights; ``auto`` takes the checkpoint's own.
        attn_implementation: Such as ``sdpa``, ``eager`` or ``flash_attention_2``. Default: transformers' choice.
        gradient_checkpointing: Trade time for memory in training.
        trust_remote_code: Run code that the model's author put on the hub.
        optimizer: Optimizer of all parameters.
        lr_scheduler: Learning-rate scheduler, stepped after every optimizer step.
        model_kwargs: More arguments of ``from_pretrained``.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        lr_scheduler: LRSchedulerCallable | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("pretrained")  # what a checkpoint needs to load; the rest is the run's to choose
        self.pretrained = pretrained
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.model_kwargs = {
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
            **(model_kwargs or {}),
        }
        self.model: Any = None
        self.tokenizer: Any = None
        self.perplexity = Perplexity()

    def configure_model(self) -> None:
        """Load the model; called by the Trainer before every run."""
        if self.model is None:
            self.tokenizer = load_tokenizer(self.pretrained, trust_remote_code=self.trust_remote_code)
            self.model = load_model(self.pretrained, **self.model_kwargs).train()
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable()

    def forward(self, **inputs: Tensor) -> Any:
        """Call the model, without a cache."""
        return self.model(**inputs, use_cache=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the next token."""
        loss = self(**batch, labels=_labels(batch)).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to ``val/perplexity``."""
        self._evaluate(batch, "val/perplexity")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to ``test/perplexity``."""
        self._evaluate(batch, "test/perplexity")

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the scheduler that were asked for."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch: dict[str, Tensor], name: str) -> None:
        self.perplexity.update(self(**batch).logits, _labels(batch))
        self.log(name, self.perplexity, on_step=False, on_epoch=True, prog_bar=True)


def _labels(batch: dict[str, Tensor]) -> Tensor:
    """Predict every token but padding."""
    ids_BT = batch["input_ids"]
    return ids_BT.masked_fill(batch["attention_mask"] == 0, -100) if "attention_mask" in batch else ids_BT
