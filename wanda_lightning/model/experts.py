"""What enters each expert of a mixture whose experts are fused into 3-D parameters.

Such a module is called once with all tokens and the experts that the router chose for each. Nothing in it is a linear
that a hook could watch, so the inputs of every expert are computed from the arguments of that call.
Shapes: T tokens, I in features, O out features, K experts chosen for a token.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from wanda_lightning.model.linears import EXPERT_INPUTS, EXPERT_OUTPUT, PrunableLinear


def expert_inputs(
    linears: Sequence[PrunableLinear], hidden: Tensor, top_k_index: Tensor, mask_BT: Tensor | None
) -> Iterator[tuple[PrunableLinear, Tensor]]:
    """Yield each expert matrix with the tokens routed to it; matrices that got no token are left out.

    Args:
        linears: Matrices of one module of experts.
        hidden: What enters the module, shape (T, I) or (B, T, I).
        top_k_index: The experts of each token, shape (T, K) or (B, T, K). Numbers beyond the last expert mean none.
        mask_BT: Which tokens are real; None where all are.

    Yields:
        The matrix and its inputs, shape (tokens routed to it, in_features).
    """
    hidden_TI = hidden.reshape(-1, hidden.shape[-1])
    index_TK = top_k_index.reshape(-1, top_k_index.shape[-1])
    assert len(hidden_TI) == len(index_TK), f"{len(index_TK)} tokens are routed, {len(hidden_TI)} enter the experts"
    real_T = None if mask_BT is None else mask_BT.reshape(-1).to(hidden.device)
    by_expert: dict[int, list[PrunableLinear]] = {}
    for linear in linears:
        by_expert.setdefault(cast(int, linear.expert), []).append(linear)
    for expert, matrices in by_expert.items():
        chosen_T = (index_TK == expert).any(-1).to(hidden.device)
        tokens_TI = hidden_TI[chosen_T if real_T is None else chosen_T & real_T]
        if not len(tokens_TI):
            continue
        for linear in matrices:
            yield linear, _intermediate(linear, tokens_TI) if linear.parameter == EXPERT_OUTPUT else tokens_TI


def _intermediate(down: PrunableLinear, tokens_TI: Tensor) -> Tensor:
    """Compute what enters an expert's second matrix, as its module does."""
    experts = cast(Any, down.module)
    name = next(name for name in EXPERT_INPUTS if hasattr(experts, name))
    weight_OI = PrunableLinear(down.name, experts, down.experts, name, down.expert).weight_OI
    bias = getattr(experts, f"{name}_bias", None)
    bias_O = None if bias is None else bias[down.expert]
    out_TO = nn.functional.linear(tokens_TI.to(weight_OI.device), weight_OI, bias_O)
    return experts._apply_gate(out_TO) if experts.has_gate else experts.act_fn(out_TO)
