"""Whether a model runs at all: on a few tokens, and with its cache when it continues them. Shape: T tokens."""

from typing import Any

import torch
from torch import nn

from wanda_lightning.model.offload import device_of
from wanda_lightning.model.replaced import replaced

TOKENS = 8


def why_it_fails(model: nn.Module) -> str:
    """Let a language model read a few tokens, and continue them where it can generate.

    Args:
        model: A causal language model of transformers, in eval mode.

    Returns:
        What it raised; empty if it ran.
    """
    plain: Any = model
    embeddings = plain.get_input_embeddings()
    ids_1T = torch.arange(min(TOKENS, embeddings.weight.shape[0]), device=device_of(embeddings))[None]
    try:
        plain(input_ids=ids_1T, use_cache=False)
        if plain.can_generate():
            # Nothing that its files say of sampling or of an end is wanted. The second token is read with the cache.
            settings = type(plain.generation_config)(max_new_tokens=2, do_sample=False, pad_token_id=0)
            with replaced(plain, "generation_config", settings):
                plain.generate(ids_1T, attention_mask=torch.ones_like(ids_1T))
    except Exception as error:  # whatever a family's own code raises where something is not there
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""
