"""What enters each expert of a mixture whose experts are fused into 3-D parameters.

Such a module is called once with all tokens. Nothing in it is a linear that a hook could watch, so the inputs of every
expert are computed from the arguments of that call, or, where a module is called in a way of its own, seen in the
products that it takes.
Shapes: T tokens, I in features, O out features, E experts, K experts chosen for a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from wanda_lightning.model.linears import EXPERT_INPUTS, EXPERT_OUTPUT, PrunableLinear, in_experts_interface
from wanda_lightning.model.products import EVERY, Products


def called_in_its_own_way(linear: PrunableLinear) -> bool:
    """Whether a matrix is one of fused experts outside of transformers' experts interface."""
    return linear.expert is not None and not in_experts_interface(linear.module)


def numbers_a_token(linear: PrunableLinear) -> int:
    """Count what enters a linear for a token; of experts that may all see all tokens, what enters each."""
    return linear.weight_OI.shape[1] * (len(linear.weight) if called_in_its_own_way(linear) else 1)


def expert_inputs(
    linears: Sequence[PrunableLinear], inputs: Sequence[Any], mask_BT: Tensor | None
) -> Iterator[tuple[PrunableLinear, Tensor]]:
    """Yield each expert matrix with the tokens routed to it; matrices that got no token are left out.

    Args:
        linears: Matrices of one module of experts.
        inputs: What the module is called with. In transformers' experts interface this begins with the hidden states,
            (T, I) or (B, T, I), and the experts of each token, (T, K) or (B, T, K); numbers beyond the last expert mean
            none.
        mask_BT: Which tokens are real; None where all are.

    Yields:
        The matrix and its inputs, shape (tokens routed to it, in_features).

    Raises:
        ValueError: If the inputs of a module outside of that interface cannot be told.
    """
    if called_in_its_own_way(linears[0]):
        yield from _seen_in_products(linears, inputs, mask_BT)
        return
    hidden, top_k_index, *_ = inputs
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
    weight_OI = replace(down, parameter=name).weight_OI
    bias = getattr(experts, f"{name}_bias", None)
    bias_O = None if bias is None else bias[down.expert]
    out_TO = F.linear(tokens_TI.to(weight_OI.device), weight_OI, bias_O)
    return experts._apply_gate(out_TO) if experts.has_gate else experts.act_fn(out_TO)


def _seen_in_products(
    linears: Sequence[PrunableLinear], inputs: Sequence[Any], mask_BT: Tensor | None
) -> Iterator[tuple[PrunableLinear, Tensor]]:
    """Run a module of experts on the real tokens, and yield what its matrices are multiplied with."""
    experts = linears[0].module
    with _ExpertProducts(experts) as watched:
        experts.forward(*(inputs if mask_BT is None else _real(inputs, mask_BT, linears[0])))
    if watched.used and (unseen := {x.parameter for x in linears} - {parameter for parameter, _ in watched.seen}):
        raise ValueError(
            f"what enters {linears[0].experts}.{min(unseen)} cannot be told: {type(experts).__name__} multiplies with "
            "it in another way than by F.linear, matmul, mm or bmm; leave it out with ignore"
        )
    for linear in linears:
        for x_TI in watched.seen.get((linear.parameter, linear.expert), []):
            yield linear, x_TI


def _real(inputs: Sequence[Any], mask_BT: Tensor, linear: PrunableLinear) -> list[Any]:
    """Return what a module is called with, without padding.

    Where there are several tensors, such as hidden states and chosen experts, each has a row a token. One by itself has
    them for each expert in turn.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    times = 1 if len(tensors) > 1 else len(linear.weight)
    if {len(x) for x in tensors} != {times * mask_BT.numel()}:
        raise ValueError(
            f"{linear.experts} is called with {len(tensors[0])} rows for {mask_BT.numel()} tokens, and which of them "
            "are padding cannot be told: calibrate without padding, on sequences of equal length"
        )
    real_T = mask_BT.flatten().to(tensors[0].device).repeat(times)
    return [x[real_T] if isinstance(x, Tensor) else x for x in inputs]


class _ExpertProducts(Products):
    """Within it, what fused experts are multiplied with is seen.

    Attributes:
        seen: The inputs, each (tokens, I), by the name of the parameter and the number of the expert.
        used: Whether anything is computed with the weights; not where no token comes.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__(EVERY, self._look)
        self._experts = experts
        self.seen: dict[tuple[str, int | None], list[Tensor]] = {}
        self.used = False

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":  # of a shape, or the like
            weights = self._experts._parameters.values()
            self.used |= any(x is weight for x in args for weight in weights if weight is not None)
        return super().__torch_function__(func, types, args, kwargs)

    def _look(self, x: Tensor, factor: Tensor) -> None:
        for name in (*EXPERT_INPUTS, EXPERT_OUTPUT):
            weight = getattr(self._experts, name, None)
            if weight is None:
                continue
            start = (factor.data_ptr() - weight.data_ptr()) // weight.element_size()
            if 0 <= start < weight.numel():  # a view of the weight: one expert, or all
                each = x.expand(*x.shape[:-3], len(factor), -1, -1).unbind(-3) if factor.dim() == 3 else [x]
                for expert, x_TI in enumerate(each, start // weight.stride(0)):
                    # Where all experts see all tokens, those that were not chosen for one see zeros.
                    self.seen.setdefault((name, expert), []).append(x_TI[x_TI.any(-1)])
