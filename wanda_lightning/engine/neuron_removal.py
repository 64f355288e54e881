"""Removing neurons as a pruning method: of the matrix that reads them, whole columns go.

Shapes: O out features, I in features (the neurons), B blocks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.solvers.neurons import fit_to_all_inputs, remove_blocks, remove_inputs
from wanda_lightning.sparsity import Pattern, Unstructured
from wanda_lightning.statistics import InputHessian, InputNorm, InputStatistic

NeuronChoice = Literal["obs", "wanda", "magnitude"]


@dataclass(frozen=True)
class Columns(Unstructured):
    """Keep so many whole columns.

    Args:
        sparsity: Fraction of the columns that go.
        kept: How many stay.
        block: How many, one after another, go together.
    """

    kept: int = 1
    block: int = 1

    @override
    def mask(self, score_GN: Tensor) -> Tensor:
        """Keep the blocks of columns with the largest sums; ties go by position."""
        sum_B = score_GN.mean(0).unflatten(0, (-1, self.block)).sum(1)
        order_B = sum_B.sort(descending=True, stable=True).indices
        mask_B = torch.zeros_like(sum_B, dtype=torch.bool).index_fill_(0, order_B[: self.kept // self.block], 1)
        return mask_B.repeat_interleave(self.block).expand_as(score_GN)

    @override
    def check_mask(self, mask_OI: Tensor, tolerance: float) -> None:
        """Refuse a mask that keeps more or fewer columns than asked for, or a part of one."""
        if (stay := int(mask_OI[0].sum())) != self.kept:
            raise ValueError(f"{stay} columns stay, not {self.kept}")
        if not (mask_OI == mask_OI[0]).all():
            raise ValueError("a column stays in some rows only")


@dataclass(frozen=True)
class NeuronRemoval(PruningMethod):
    """Remove the neurons whose loss costs least, and let the others make up for them.

    Args:
        choice: Which go, see :func:`wanda_lightning.prune_width`, as all.
        refit: Whether the columns that stay are fitted.
        shrinkage: Of the Hessian.
    """

    choice: NeuronChoice
    refit: bool
    shrinkage: float

    @property
    def statistic(self) -> type[InputStatistic] | None:
        """X^T X where it is needed, else the norm of each input, or nothing."""
        by_score = {"obs": InputHessian, "wanda": InputNorm, "magnitude": None}
        return InputHessian if self.refit else by_score[self.choice]

    @torch.no_grad()
    def prune(self, weight_OI: Tensor, statistic: InputStatistic | None, pattern: Pattern) -> Tensor:
        """Remove columns in place; the mask says of each which rows it keeps: all or none."""
        assert isinstance(pattern, Columns)
        mask_OI = self._mask(weight_OI, statistic, pattern)
        mask_I, dense_OI = mask_OI[0], weight_OI.clone()
        weight_OI[:, ~mask_I] = 0
        if self.refit:
            assert isinstance(statistic, InputHessian)
            fitted_OK = fit_to_all_inputs(dense_OI, mask_I, statistic.compute(), shrinkage=self.shrinkage)
            weight_OI[:, mask_I] = fitted_OK.to(weight_OI.dtype)
        return mask_OI

    def _mask(self, weight_OI: Tensor, statistic: InputStatistic | None, pattern: Columns) -> Tensor:
        """Choose the columns that stay, (O, I)."""
        if self.choice == "obs":
            assert isinstance(statistic, InputHessian)
            factor = statistic.factor(shrinkage=self.shrinkage)
            gone = (weight_OI.shape[1] - pattern.kept) // pattern.block
            if pattern.block == 1:
                mask_I = remove_inputs(weight_OI, factor, gone)
            else:
                mask_I = remove_blocks(weight_OI, factor, gone, pattern.block)
            return mask_I.expand_as(weight_OI)
        score_OI = weight_OI.float().abs()
        if self.choice == "wanda":
            norm = statistic.norm() if isinstance(statistic, InputHessian) else statistic
            assert isinstance(norm, InputNorm)
            score_OI *= norm.compute()
        return pattern.mask(score_OI)
