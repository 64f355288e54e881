"""Seeing the matrix products that a module takes, whatever code it takes them in."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
EVERY = (F.linear, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, *MATMULS)


class Products(TorchFunctionMode):
    """Within it, products are shown before they are taken.

    Args:
        functions: The functions that take them, of :data:`EVERY`.
        see: Is given the two operands.
    """

    def __init__(self, functions: Collection[Any], see: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._functions, self._see = functions, see

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._functions:
            self._see(*(*args, *(kwargs or {}).values())[:2])
        return func(*args, **(kwargs or {}))
