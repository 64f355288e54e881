"""Text from a saved model, for ``wanda-lightning generate``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wanda_lightning.arguments import checked_device, plain, whole_number
from wanda_lightning.checkpoints.loading import load_model, load_tokenizer
from wanda_lightning.checkpoints.quiet import quiet_if_small
from wanda_lightning.evaluation.generation import PROMPTS, TOKENS, check_prompts, continue_prompts


def generate(
    pretrained: str | Path,
    prompts: Sequence[str] = (),
    tokens: int = TOKENS,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Let a saved model continue texts, always with its most likely next token.

    Args:
        pretrained: See ``load_model``.
        prompts: Texts. Default: those of the reports.
        tokens: Tokens to add to each, at most.
        dtype: See ``load_model``.
        device: Where it computes. Default: the GPU, if there is one that torch can use.
        trust_remote_code: Run code that the model's author put beside it.

    Returns:
        What was added, by prompt.

    Raises:
        ValueError: If there is no such model, it has no tokenizer, or a prompt is empty, or there is no such device.
    """
    tokens = plain(tokens)
    whole_number("tokens", tokens, 1)
    check_prompts(prompts)
    place = checked_device(device)
    with quiet_if_small(pretrained):
        model: Any = load_model(pretrained, dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(pretrained, trust_remote_code=trust_remote_code)
    return continue_prompts(model.to(place), tokenizer, prompts or PROMPTS, tokens)
