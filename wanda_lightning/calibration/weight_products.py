"""Products with a linear's weight that the model takes without calling the linear, as Mamba does with ``dt_proj``.

Shapes: B batch, T tokens, I in features.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class WeightProducts(TorchFunctionMode):
    """Within it, every product ``weight @ x`` shows what would have entered the linear that the weight is of.

    Args:
        modules: The linears.
        called: Takes a linear's module and its inputs, shape (B, T, I), before the product is taken.
    """

    def __init__(self, modules: Iterable[nn.Module], called: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self._modules = {id(each.weight): each for each in modules if isinstance(each, nn.Linear)}
        self._called = called

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            left, right = (*args, *(kwargs or {}).values())[:2]
            if (module := self._modules.get(id(left))) is not None:
                self._called(module, right.mT)
        return func(*args, **(kwargs or {}))
