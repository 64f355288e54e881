"""SparseGPT: one-shot pruning with second-order updates (Frantar and Alistarh 2023, arXiv:2301.00774).

Shapes: O out features, I in features.
"""

from dataclasses import dataclass

from torch import Tensor

from wanda_lightning.arguments import number_not_below_0
from wanda_lightning.methods.refinement import refined
from wanda_lightning.methods.second_order import SecondOrderMethod
from wanda_lightning.solvers import prune_with_scores
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputHessian, InputStatistic


@dataclass(frozen=True, repr=False)
class SparseGPT(SecondOrderMethod):
    """Remove the weights with the lowest w^2 / U_jj^2, block by block, and update the later ones (algorithm 1).

    The score is the error that removing the weight alone leaves once the later weights have been adapted; U is the
    upper factor of the inverse Hessian. It is taken from weights that earlier blocks have already updated, and compared
    over all rows of a block of columns, or for N:M within each group of m.

    Args:
        block_size: Columns that are chosen at once, >= 1; a multiple of m for N:M patterns.
        damping: Fraction of the Hessian's mean diagonal that is added to its diagonal, > 0.
        refine: Steps of conjugate gradients that then fit the kept weights to the dense outputs, >= 0.
        shrinkage: Fraction of each diagonal entry that is added to itself, >= 0: on few tokens, correlations are
            overrated. 0 as published; 0.3 was better in our measurements.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> import torch
        >>> from wanda_lightning.sparsity import SemiStructured
        >>> x, weight = torch.randn(64, 16), torch.randn(8, 16)
        >>> hessian = InputHessian(16)
        >>> hessian.update(x)
        >>> mask = SparseGPT().prune(weight, hessian, SemiStructured(2, 4))
        >>> mask.sum().item(), weight.count_nonzero().item()
        (64, 64)
    """

    block_size: int = 128
    damping: float = 0.01
    refine: int = 0
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number_not_below_0("shrinkage", self.shrinkage)

    @refined
    def prune(self, weight_OI: Tensor, statistic: InputStatistic | None, pattern: Pattern) -> Tensor:
        """Prune and update one weight in place and return the mask (True = kept)."""
        assert isinstance(statistic, InputHessian)
        factor = statistic.factor(self.damping, self.shrinkage)
        # 1 / U_jj is G_jj. Removing the weight of a dead input costs nothing, whatever the damping makes of it.
        importance_I = factor.lower_II.diagonal().masked_fill(factor.dead_I, 0)
        return prune_with_scores(weight_OI, factor, importance_I, pattern, self.block_size)

    def tolerance(self, shape: tuple[int, int]) -> float:
        """Return how far a mask may be from the asked sparsity: each block keeps less than one weight too many."""
        return self._tolerance_of_blocks(shape)
