"""What the model of a run says at a stage, for its report."""

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from wanda_lightning.evaluation.generation import continue_prompts
from wanda_lightning.model.language_model import find_model, is_language_model
from wanda_lightning.model.offload import is_offloaded

log = logging.getLogger(__name__)


def samples_of(trainer: Trainer, module: LightningModule, prompts: Sequence[str]) -> dict[str, str]:
    """Let the module's model continue prompts; all processes must ask, where weights are sharded.

    Args:
        trainer: The Trainer.
        module: Its module.
        prompts: Texts.

    Returns:
        What was added, by prompt. Nothing where the model does not go on with a text, where there is no tokenizer, or
        where weights are on disk or in RAM and would have to be loaded for every token.
    """
    model: Any = find_model(module)
    if not prompts or not is_language_model(model) or is_offloaded(model):
        return {}
    if (tokenizer := tokenizer_of(trainer, module)) is None:
        return {}
    try:
        with trainer.precision_plugin.forward_context():
            return continue_prompts(model, tokenizer, prompts)
    except Exception as error:  # models of others fail in many ways, and the figures are worth more than the texts
        log.warning("what the model says is missing in the report: it cannot continue a text (%r)", error)
        return {}


def tokenizer_of(trainer: Trainer | None, module: LightningModule) -> Any:
    """Return the tokenizer of the module, else that of the datamodule, loaded if only its name is known; or None."""
    given = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    tokenizer = getattr(module, "tokenizer", None) or given
    if isinstance(tokenizer, str):
        from wanda_lightning.checkpoints.loading import load_tokenizer

        return load_tokenizer(tokenizer)
    return tokenizer
