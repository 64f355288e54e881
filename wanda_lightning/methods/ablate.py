"""Ablate: the masks of first-order methods with the weight updates of SparseGPT (Sun et al. 2023, arXiv:2306.11695).

The Wanda paper's ablation of pruning metric and weight update (section 5). Shapes: O out features, I in features.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from wanda_lightning.arguments import one_of
from wanda_lightning.methods.refinement import refined
from wanda_lightning.methods.second_order import SecondOrderMethod
from wanda_lightning.solvers import prune_with_mask, prune_with_scores
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputHessian, InputStatistic

Selection = Literal["wanda", "magnitude"]
Schedule = Literal["sequential", "iterative"]


@dataclass(frozen=True, repr=False)
class Ablate(SecondOrderMethod):
    """Choose weights by Wanda's score or by magnitude, and update those that stay as SparseGPT does.

    Args:
        selection: ``"wanda"`` scores |W_ij| * ||X_j||_2, ``"magnitude"`` scores |W_ij|.
        schedule: ``"sequential"`` fixes the whole mask before the first update, comparing as Wanda does within each
            output row and as magnitude pruning does over the whole matrix; ``"iterative"`` chooses block by block from
            updated weights, comparing over all rows of a block. N:M patterns compare within each group of m.
        block_size: Columns between two updates of all later columns, >= 1; a multiple of m for N:M patterns.
        damping: Fraction of the Hessian's mean diagonal that is added to its diagonal, > 0.
        refine: Steps of conjugate gradients that then fit the kept weights to the dense outputs, >= 0.

    Raises:
        ValueError: If a setting is out of range.
    """

    selection: Selection = "wanda"
    schedule: Schedule = "sequential"
    block_size: int = 128
    damping: float = 0.01
    refine: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("selection", self.selection, Selection)
        one_of("schedule", self.schedule, Schedule)

    @refined
    def prune(self, weight_OI: Tensor, statistic: InputStatistic | None, pattern: Pattern) -> Tensor:
        """Prune and update one weight in place and return the mask (True = kept)."""
        assert isinstance(statistic, InputHessian)
        factor = statistic.factor(self.damping)
        # A dead input's weights score 0 in both selections: removing them costs nothing.
        importance_I = statistic.norm().compute() if self.selection == "wanda" else ~factor.dead_I
        if self.schedule == "iterative":
            return prune_with_scores(weight_OI, factor, importance_I, pattern, self.block_size)
        score_OI = weight_OI.abs() * importance_I.to(weight_OI.device)
        groups = score_OI if self.selection == "wanda" else score_OI.reshape(1, -1)
        mask_OI = pattern.mask(groups).view(weight_OI.shape)
        prune_with_mask(weight_OI, factor, mask_OI, self.block_size)
        return mask_OI

    @property
    def zeros_stay(self) -> bool:  # type: ignore[override]
        """Whether weights that are zero stay so: if the whole mask is fixed before the first update."""
        return self.schedule == "sequential"

    def tolerance(self, shape: tuple[int, int]) -> float:
        """How far a mask may lie from the asked sparsity: less than one weight in each comparison group."""
        if self.schedule == "iterative":
            return self._tolerance_of_blocks(shape)
        return super().tolerance(shape) if self.selection == "wanda" else 1 / (shape[0] * shape[1])
