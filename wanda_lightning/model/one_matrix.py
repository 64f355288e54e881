"""Whether a class of linears of its own multiplies all inputs with the whole weight, as ``nn.Linear`` does.

Some part them: in DeepSeek-V4's grouped projection each group of outputs sees its own inputs.
"""

from collections import OrderedDict
from contextlib import suppress
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanda_lightning.model.products import Products


def is_one_matrix(linear: nn.Linear) -> bool:
    """Tell from what a linear does with a few inputs, without values.

    Args:
        linear: An ``nn.Linear``, or of a class derived from it.

    Returns:
        Whether its weight meets them in one product, whatever it does besides (rounding, choosing experts), or it gives
        what a linear gives.
    """
    if type(linear).forward is nn.Linear.forward or linear._parameters.get("weight") is None:
        return True
    twin = cast(nn.Linear, _on_meta(linear))  # which computes nothing
    factors: list[Tensor] = []
    given: Any = None
    with torch.no_grad(), suppress(Exception), Products((F.linear,), lambda _, factor: factors.append(factor)):
        given = type(linear).forward(twin, twin.weight.new_zeros(1, 5, linear.in_features))
    return any(factor.shape == twin.weight.shape for factor in factors) or (
        isinstance(given, Tensor) and given.shape == (1, 5, linear.out_features)
    )


def _on_meta(module: nn.Module) -> nn.Module:
    """Return a module of the same class that has shapes instead of values, and none of the hooks."""
    twin = copy(module)
    twin.__dict__.pop("forward", None)
    for name in ("_parameters", "_buffers"):
        held = module.__dict__[name].items()
        twin.__dict__[name] = {n: None if x is None else x.detach().to("meta") for n, x in held}
    twin._modules = {n: None if child is None else _on_meta(child) for n, child in module._modules.items()}
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin
