"""ADMM: mask and weights are found together (Boza 2024, arXiv:2401.02938).

Shapes: O out features, I in features.
"""

from dataclasses import dataclass

from torch import Tensor

from wanda_lightning.arguments import positive_number, whole_number
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.methods.refinement import refined
from wanda_lightning.solvers import prune_with_admm
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputHessian, InputStatistic


@dataclass(frozen=True)
class ADMM(PruningMethod):
    """Alternate between weights that fit the outputs and weights that obey a growing mask; then fit what stays.

    Weights compete by their size times the norm of their input, as in Wanda, but once the others have adapted: over the
    whole matrix, or for N:M within each group of m. See :mod:`wanda_lightning.solvers.admm` for the iteration.

    Args:
        steps: Number of steps in which the mask grows to its full sparsity, >= 1.
        rho: How strongly weights are drawn to the mask at the end, relative to the curvature of a single weight, > 0.
        damping: Fraction of the Hessian's diagonal that is added to it, > 0.
        refine: Steps of conjugate gradients at the end, on the weights that stay, >= 0.

    Raises:
        ValueError: If a setting is out of range.
    """

    statistic = InputHessian
    zeros_stay = False  # weights are chosen among once the others have adapted
    steps: int = 40
    rho: float = 1.0
    damping: float = 0.01
    refine: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("steps", self.steps, 1)
        positive_number("rho", self.rho)
        positive_number("damping", self.damping)

    @refined
    def prune(self, weight_OI: Tensor, statistic: InputStatistic | None, pattern: Pattern) -> Tensor:
        """Prune and update one weight in place and return the mask (True = kept)."""
        assert isinstance(statistic, InputHessian)
        hessian_II = statistic.compute().to(weight_OI.device)
        return prune_with_admm(weight_OI, hessian_II, pattern, self.steps, self.rho, self.damping)

    def tolerance(self, shape: tuple[int, int]) -> float:
        """Return how far a mask may be from the asked sparsity: less than one weight of the matrix."""
        return 1 / (shape[0] * shape[1])
