"""Magnitude pruning: the smallest weights of a matrix go. The baseline, without calibration data."""

from dataclasses import dataclass

from torch import Tensor

from wanda_lightning.methods.base import ScoreMethod
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputHessian, InputStatistic


@dataclass(frozen=True, repr=False)
class Magnitude(ScoreMethod):
    """Score |W|, compared over the whole matrix (Han et al. 2015, arXiv:1506.02626).

    Args:
        refine: Steps of conjugate gradients that then fit the kept weights to the dense outputs, >= 0. More than 0
            needs calibration.

    Raises:
        ValueError: If ``refine`` is not a whole number of at least 0.
    """

    refine: int = 0

    @property
    def statistic(self) -> type[InputStatistic] | None:
        """The Hessian if weights are refined, else None."""
        return InputHessian if self.refine else None

    def score(self, weight_OI: Tensor, statistic: InputStatistic | None = None) -> Tensor:
        """Return |W|."""
        return weight_OI.abs()

    def mask(self, score_OI: Tensor, pattern: Pattern) -> Tensor:
        """Let all weights of the matrix compete."""
        return pattern.mask(score_OI.reshape(1, -1)).view(score_OI.shape)


class MagnitudeInRows(Magnitude):
    """Compared within each output row: what experts are pruned by, whatever the method, that no token reaches."""

    def mask(self, score_OI: Tensor, pattern: Pattern) -> Tensor:
        """Let the weights of an output row compete."""
        return pattern.mask(score_OI)
