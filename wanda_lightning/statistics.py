"""What pruning methods know of a linear's inputs: raw sums over calibration tokens, scaled once at the end.

Raw sums and counts merge exactly over batches and over processes, whatever the order and the split.
Shapes: B batch, T tokens, O out features, I in features, P in features of a panel.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wanda_lightning.precision import full_float32
from wanda_lightning.solvers.factor import Factor, factorize


class InputStatistic(ABC):
    """A sum over the calibration tokens that enter a linear.

    Args:
        in_features: Width of the inputs, I.
        device: Where the sum is kept. Default: the CPU.
        dtype: Precision of the sum, float32 or float64.

    Attributes:
        total: The raw sum so far.
        tokens: How many tokens are in it.
        is_summed: Whether it has been added up over all processes.
        owner: The process that has it then; None if all have it.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32):
        self.in_features = in_features
        self.total = self._zero(device, dtype)
        self.tokens = 0
        self.is_summed = False
        self.owner: int | None = None

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs.

        Args:
            x: Inputs, shape (tokens, in_features) or (B, T, in_features), any floating dtype.

        Raises:
            ValueError: If the last dimension is not ``in_features``.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"inputs must have {self.in_features} features, got a tensor of shape {tuple(x.shape)}")
        x_TI = x.reshape(-1, self.in_features)
        self._add(x_TI)
        self.tokens += x_TI.shape[0]

    def merge(self, other: "InputStatistic") -> None:
        """Add what another statistic of the same kind has seen."""
        self.total += other.total.to(self.total)
        self.tokens += other.tokens

    @property
    def sums(self) -> list[Tensor]:
        """What is to be added up over processes."""
        return [self.total]

    @property
    def is_finite(self) -> bool:
        """Whether no input was NaN or infinite, and no sum has overflowed."""
        return bool(self.total.isfinite().all())

    def summed(self, tokens: int, owner: int | None = None, rank: int | None = None) -> None:
        """Note that ``total`` is now the sum over all processes.

        Args:
            tokens: How many tokens all of them have seen.
            owner: The process that has the sum; None if all have it.
            rank: This process; if another is the owner, its sums are freed.
        """
        self.is_summed, self.tokens, self.owner = True, tokens, owner
        if owner != rank:
            for tensor in self.sums:
                tensor.data = tensor.new_empty(0)

    @abstractmethod
    def _zero(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor: ...

    @abstractmethod
    def _add(self, x_TI: Tensor) -> None: ...

    @abstractmethod
    def compute(self) -> Tensor:
        """Finish the statistic from the sums."""

    @abstractmethod
    def output_energy(self, matrix_OI: Tensor) -> Tensor:
        """Squared L2 norm, over all tokens, of every output of a linear with this weight.

        Args:
            matrix_OI: Weight, or a difference of weights, shape (out_features, in_features).

        Returns:
            ||matrix X||^2 of each row, shape (out_features,), in the precision of the sums.
        """


class InputNorm(InputStatistic):
    """L2 norm of every input feature over all calibration tokens, ||X_j||_2 of Wanda (arXiv:2306.11695, eq. 1)."""

    at_once = 2**18
    """Numbers that a CPU squares at a time: so few stay in its cache, and squares need no new memory."""

    def _zero(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.in_features, device=device, dtype=dtype)

    def _add(self, x_TI: Tensor) -> None:
        tokens = max(1, self.at_once // self.in_features if x_TI.device.type == "cpu" else len(x_TI))
        first_TI, *others = x_TI.split(tokens)
        sums_TI = first_TI.to(self.total.dtype).square()
        for other_TI in others:
            other_TI = other_TI.to(self.total.dtype)
            sums_TI[: len(other_TI)].addcmul_(other_TI, other_TI)
        self.total += sums_TI.sum(0)

    def compute(self) -> Tensor:
        """Return the norms, shape (in_features,)."""
        return self.total.sqrt()

    def output_energy(self, matrix_OI: Tensor) -> Tensor:
        """Estimate the energy from the diagonal of X^T X: exact if the inputs were uncorrelated."""
        with full_float32(self.total.device):
            return matrix_OI.to(self.total).square() @ self.total


def sum_norms(norms: Sequence[InputStatistic], sum_tensors: Callable[[Sequence[Tensor]], None]) -> None:
    """Add norms up over all processes, given what replaces tensors of one dtype by such sums; all have them then."""
    tokens = torch.tensor([norm.tokens for norm in norms], device=norms[0].total.device)
    sum_tensors([tokens])
    sum_tensors([norm.total for norm in norms])
    for norm, count in zip(norms, tokens.tolist(), strict=True):
        norm.summed(count)


class InputHessian(InputStatistic):
    """Second moments of the inputs, H = 2/T X^T X: the Hessian of the layer's squared error (arXiv:2301.00774, eq. 2).

    X^T X is symmetric, so only panels that cover its lower triangle are summed. What ``total`` holds above the
    diagonal is incomplete; :meth:`compute` mirrors the lower triangle.
    """

    panels = 8
    """Panels of columns; with p of them (1 + 1/p) / 2 of the full product is computed."""
    chunk = 16384
    """Tokens at a time, so that a converted copy of the inputs stays small."""

    def __init__(self, in_features: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(in_features, device, dtype)
        self._factors: dict[tuple[float, float], Factor] = {}

    def _zero(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.in_features, self.in_features, device=device, dtype=dtype)

    def _add(self, x_TI: Tensor) -> None:
        self._factors.clear()
        # Products of two bfloat16 or float16 numbers are exact in float32, so tensor cores lose nothing.
        exact_in_half = x_TI.is_cuda and x_TI.dtype in (torch.bfloat16, torch.float16)
        keep_dtype = exact_in_half and self.total.dtype == torch.float32
        with full_float32(self.total.device):
            for chunk_TI in x_TI.split(self.chunk):
                y_TI = chunk_TI if keep_dtype else chunk_TI.to(self.total.dtype)
                for start, stop in self._panels():
                    # From the diagonal down: a tenth faster on CPUs than the rows of the triangle.
                    left_IT, right_TP = y_TI[:, start:].t(), y_TI[:, start:stop]
                    panel_IP = self.total[start:, start:stop]
                    if keep_dtype:
                        panel_IP += torch.mm(left_IT, right_TP, out_dtype=torch.float32)
                    else:
                        panel_IP.addmm_(left_IT, right_TP)

    def merge(self, other: InputStatistic) -> None:
        """Add what another Hessian has seen."""
        self._factors.clear()
        super().merge(other)

    def compute(self) -> Tensor:
        """Return H = 2/T X^T X, symmetric, shape (in_features, in_features)."""
        lower_II = self.total.tril()
        return (lower_II + lower_II.tril(-1).t()).mul_(2 / max(self.tokens, 1))

    @property
    def is_finite(self) -> bool:
        """Whether the sums of squares are finite: they bound what is beside the diagonal."""
        return bool(self.total.diagonal().isfinite().all())

    def norm(self) -> InputNorm:
        """Return what an :class:`InputNorm` would hold after the same inputs: the diagonal of the sums."""
        norm = InputNorm(self.in_features)
        norm.total, norm.tokens = self.total.diagonal().clone(), self.tokens
        return norm

    def factor(self, damping: float = 0.01, shrinkage: float = 0.0) -> Factor:
        """Return the triangular factor of the damped Hessian; computed once for all linears that share these inputs.

        Args:
            damping: Fraction of the mean diagonal to add, see :func:`~wanda_lightning.solvers.factorize`.
            shrinkage: Fraction of each diagonal entry to add to itself.

        Returns:
            The factor.

        Raises:
            torch.linalg.LinAlgError: If the Hessian cannot be factorised.
        """
        if (damping, shrinkage) not in self._factors:
            self._factors[damping, shrinkage] = factorize(self.total, damping, shrinkage)  # its scale does not matter
        return self._factors[damping, shrinkage]

    @property
    def damping(self) -> float | None:
        """The damping that the factor took, larger than asked for if that was not enough; None without a factor."""
        return max((factor.damping for factor in self._factors.values()), default=None)

    def output_energy(self, matrix_OI: Tensor) -> Tensor:
        """Compute the energy exactly, as the quadratic form of X^T X in each row of the matrix."""
        rows_OI = matrix_OI.to(self.total)
        energy_O = rows_OI.new_zeros(len(rows_OI))
        with full_float32(self.total.device):
            for start, stop in self._panels():
                # A panel's diagonal square counts once, what lies below it also for its mirror image.
                panel_OP = rows_OI[:, start:stop]
                product_OP = panel_OP @ self.total[start:stop, start:stop]
                if stop < self.in_features:
                    product_OP.addmm_(rows_OI[:, stop:], self.total[stop:, start:stop], alpha=2)
                energy_O += (product_OP * panel_OP).sum(1)
        return energy_O.clamp_min_(0)

    def _panels(self) -> list[tuple[int, int]]:
        """Split the input features into ranges of equal width, a multiple of what a CPU computes at once."""
        width = -(-self.in_features // (32 * self.panels)) * 32
        return [(start, min(start + width, self.in_features)) for start in range(0, self.in_features, width)]
