"""What pruning methods know of a linear's inputs: raw sums over calibration tokens, scaled once at the end.

Raw sums and counts merge exactly over batches and over processes, whatever the order and the split.
Shapes: B batch, T tokens, I in features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class InputStatistic(ABC):
    """A sum over the calibration tokens that enter a linear.

    Args:
        in_features: Width of the inputs, I.
        device: Where the sum is kept. Default: the CPU.
        dtype: Precision of the sum, float32 or float64.

    Attributes:
        total: The raw sum so far.
        tokens: How many tokens are in it.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32):
        self.in_features = in_features
        self.total = self._zero(device, dtype)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs.

        Args:
            x: Inputs, shape (tokens, in_features) or (B, T, in_features), any floating dtype.

        Raises:
            ValueError: If the last dimension is not ``in_features``.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"inputs must have {self.in_features} features in their last dimension, got {tuple(x.shape)}"
            )
        x_TI = x.reshape(-1, self.in_features)
        self._add(x_TI)
        self.tokens += x_TI.shape[0]

    def merge(self, other: "InputStatistic") -> None:
        """Add what another statistic of the same kind has seen."""
        self.total += other.total.to(self.total)
        self.tokens += other.tokens

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those over all processes, given a function that adds a tensor up over them."""
        self.total = sum_over_ranks(self.total)
        self.tokens = int(sum_over_ranks(torch.tensor(self.tokens, device=self.total.device)))

    @abstractmethod
    def _zero(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor: ...

    @abstractmethod
    def _add(self, x_TI: Tensor) -> None: ...

    @abstractmethod
    def compute(self) -> Tensor:
        """Finish the statistic from the sums."""


class InputNorm(InputStatistic):
    """L2 norm of every input feature over all calibration tokens, ||X_j||_2 of Wanda (arXiv:2306.11695, eq. 1)."""

    def _zero(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.in_features, device=device, dtype=dtype)

    def _add(self, x_TI: Tensor) -> None:
        self.total += x_TI.to(self.total.dtype).square().sum(0)

    def compute(self) -> Tensor:
        """Return the norms, shape (in_features,)."""
        return self.total.sqrt()
