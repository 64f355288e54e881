"""What a model says: prompts continued greedily, so that dense, pruned and trained can be read side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from wanda_lightning.model.language_model import max_sequence_length
from wanda_lightning.model.modes import in_eval_mode
from wanda_lightning.model.replaced import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "Water boils when",
)
"""The same in every report, so that reports can be compared."""
TOKENS = 40


def continue_prompts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str] = PROMPTS,
    tokens: int = TOKENS,
) -> dict[str, str]:
    """Let a model continue prompts, always with its most likely next token; nothing is random.

    Each prompt is a batch of its own, so that no padding changes what is said. No chat template is applied.

    Args:
        model: A causal language model, on its device; it keeps its mode.
        tokenizer: The tokenizer that belongs to it.
        prompts: Texts, none of them empty.
        tokens: Tokens to add to each, at most; fewer where the model ends its text, or its context does.

    Returns:
        What was added, by prompt.

    Raises:
        ValueError: If a prompt is empty, or leaves no room in the model's context.
    """
    from transformers import GenerationConfig

    check_prompts(prompts)
    limit = max_sequence_length(model.config)
    tokenized: dict[str, Any] = {prompt: tokenizer(prompt, return_tensors="pt") for prompt in prompts}
    rooms = {prompt: _room(prompt, inputs["input_ids"].shape[1], tokens, limit) for prompt, inputs in tokenized.items()}
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Whatever the files of the model say of penalties, beams, time or sampling does not count.
    last: Any = cast(Any, model).generation_config.eos_token_id
    greedy = GenerationConfig(do_sample=False, eos_token_id=last, pad_token_id=end)
    said = {}
    with torch.no_grad(), in_eval_mode(model), replaced(model, "generation_config", greedy):
        for prompt, inputs in tokenized.items():
            ids_1T = inputs["input_ids"].to(model.device)
            whole_1T: Any = model.generate(
                input_ids=ids_1T,
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=rooms[prompt],
            )
            said[prompt] = _added(tokenizer, whole_1T[0], ids_1T.shape[1])
    return said


def _added(tokenizer: Any, ids_T: Tensor, length: int) -> str:
    """Return the text behind the first tokens; by itself it would lose its space with tokenizers such as LLaMA's."""
    before, alone, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (ids_T[:length], ids_T[length:], ids_T)
    )
    return whole.removeprefix(before) if whole.startswith(before) else alone


def check_prompts(prompts: Sequence[str] | None) -> Sequence[str]:
    """Refuse prompts that are no texts.

    Args:
        prompts: Texts; None for those that are used where nobody names any.

    Returns:
        The prompts.

    Raises:
        ValueError: If they are no list of texts, or one is empty.
    """
    if prompts is None:
        return PROMPTS
    if isinstance(prompts, str) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts must be a list of texts, none of them empty, got {prompts!r}")
    return prompts


def _room(prompt: str, length: int, tokens: int, limit: int | None) -> int:
    """Return how many tokens may follow a prompt; refuse one that leaves no room for any."""
    if limit is None:
        return tokens
    if length >= limit:
        raise ValueError(
            f"a prompt of {length} tokens leaves nothing to add, for the model takes at most {limit} tokens in all: "
            f"shorten {prompt[:40]!r}{'...' * (len(prompt) > 40)}"
        )
    return min(tokens, limit - length)
