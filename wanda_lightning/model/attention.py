"""``nn.MultiheadAttention``: its projections are parameters of its own, and its output's linear is never called.

Shapes: B batch, T tokens, E embedding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.model.replaced import replaced

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""The names of its projections, of query, key and value: of parameters, or of the thirds of one."""


def holds_packed_projections(module: nn.Module) -> bool:
    """Whether a module is an ``nn.MultiheadAttention``."""
    return isinstance(module, nn.MultiheadAttention)


def projection_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a call of ``nn.MultiheadAttention`` projects: query, key and value."""
    names = ("query", "key", "value")
    query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
    return query, key, value


@contextmanager
def every_linear_is_called(model: nn.Module) -> Iterator[None]:
    """Let ``nn.MultiheadAttention`` call its ``out_proj``, so that hooks see what enters it.

    PyTorch's fast path, which in eval mode computes a whole ``nn.TransformerEncoderLayer`` without calling anything in
    it (torch.backends.mha), is off meanwhile.

    Args:
        model: The model.
    """
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    if not attentions:
        yield
        return
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for attention in attentions:
            stack.enter_context(replaced(attention, "forward", partial(_forward, attention, attention.forward)))
        yield


def _forward(attention: nn.MultiheadAttention, forward: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Attend as the module does, but with the identity in the place of ``out_proj``; then call that."""
    out_proj = attention.out_proj
    through = nn.Linear(out_proj.in_features, out_proj.in_features, bias=False, device="meta")
    weight = out_proj.weight
    through.weight = nn.Parameter(torch.eye(out_proj.in_features, device=weight.device, dtype=weight.dtype), False)
    attention._modules["out_proj"] = through
    try:
        heads_BTE, attention_weights = forward(*args, **kwargs)
    finally:
        attention._modules["out_proj"] = out_proj
    return out_proj(heads_BTE), attention_weights
