"""Wanda: pruning by weights and activations (Sun et al. 2023, arXiv:2306.11695)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wanda_lightning.methods.base import ScoreMethod
from wanda_lightning.precision import longest_float
from wanda_lightning.sparsity import Pattern, Unstructured
from wanda_lightning.statistics import InputHessian, InputNorm, InputStatistic


@dataclass(frozen=True, repr=False)
class Wanda(ScoreMethod):
    """Score |W_ij| * ||X_j||_2, compared within each output row (arXiv:2306.11695, eq. 1 and section 3).

    Args:
        variant: Every row loses the same share alpha of its total score, instead of the same number of weights. The
            lowest scores of a row are pruned as long as their sum is at most alpha times the row's total. One alpha
            serves the whole matrix, chosen so that exactly the asked fraction is pruned. Unstructured patterns only.
        refine: Steps of conjugate gradients that then fit the kept weights to the dense outputs, >= 0.

    Raises:
        ValueError: If ``refine`` is not a whole number of at least 0.
    """

    variant: bool = False
    refine: int = 0

    @property
    def statistic(self) -> type[InputStatistic]:
        """The norms; if weights are refined the Hessian, which holds them too."""
        return InputHessian if self.refine else InputNorm

    def score(self, weight_OI: Tensor, statistic: InputStatistic | None) -> Tensor:
        """Return |W_ij| * ||X_j||_2."""
        if isinstance(statistic, InputHessian):
            statistic = statistic.norm()
        assert isinstance(statistic, InputNorm)
        return weight_OI.abs() * statistic.compute().to(weight_OI.device)

    def mask(self, score_OI: Tensor, pattern: Pattern) -> Tensor:
        """Let the weights of an output row compete; in the variant, shares of the rows' totals."""
        return _variant_mask(score_OI, pattern) if self.variant else pattern.mask(score_OI)

    def check(self, pattern: Pattern) -> None:
        """Refuse N:M for the variant, whose rows keep different numbers of weights.

        Args:
            pattern: What is asked for.

        Raises:
            ValueError: If the variant is asked for with an N:M pattern.
        """
        if self.variant and not isinstance(pattern, Unstructured):
            raise ValueError(f"the Wanda variant prunes unstructured patterns only, got {pattern}: use variant=False")


def _variant_mask(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Prune each row's lowest scores up to the share alpha of its total.

    The reference searches alpha by bisection and stops within 0.1 % of the sparsity. Here each weight gets a number:
    the share of its row's total that lies at or below it. Pruning the lowest of these numbers is exact.
    """
    sorted_OI, order_OI = score_OI.sort(dim=-1, stable=True)
    dtype = longest_float(score_OI.device)
    total_O1 = sorted_OI.sum(dim=-1, keepdim=True, dtype=dtype).clamp_min(torch.finfo(dtype).tiny)
    share_OI = sorted_OI.cumsum(dim=-1, dtype=dtype).div_(total_O1)
    kept_sorted_OI = pattern.mask(share_OI.reshape(1, -1)).view(share_OI.shape)
    return torch.empty_like(kept_sorted_OI).scatter_(-1, order_OI, kept_sorted_OI)
