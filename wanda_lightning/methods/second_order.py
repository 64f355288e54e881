"""What SparseGPT and Ablate have in common: a Hessian of the inputs, its factor, and blocks of columns.

Shapes: O out features, I in features.
"""

import math

from wanda_lightning.arguments import positive_number, whole_number
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.sparsity import Pattern, SemiStructured
from wanda_lightning.statistics import InputHessian


class SecondOrderMethod(PruningMethod):
    """A method that updates the kept weights so that the layer's outputs change as little as possible.

    Attributes:
        block_size: Columns between two updates of all later columns, >= 1; a multiple of m for N:M patterns.
        damping: Fraction of the Hessian's mean diagonal that is added to its diagonal, > 0.
    """

    statistic = InputHessian
    zeros_stay = False  # weights are updated before it is chosen among them
    block_size: int
    damping: float

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("block_size", self.block_size, 1)
        positive_number("damping", self.damping)

    def check(self, pattern: Pattern) -> None:
        """Refuse N:M groups that would straddle two blocks.

        Args:
            pattern: What is asked for.

        Raises:
            ValueError: If the block size is not a multiple of m.
        """
        if isinstance(pattern, SemiStructured) and self.block_size % pattern.m:
            raise ValueError(
                f"block_size must be a multiple of {pattern.m} for pattern {pattern}, got {self.block_size}"
            )

    def _tolerance_of_blocks(self, shape: tuple[int, int]) -> float:
        """Share of the weights that can stay because each block rounds its number of pruned weights down."""
        return math.ceil(shape[1] / self.block_size) / (shape[0] * shape[1])
