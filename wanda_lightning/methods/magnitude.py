"""Magnitude pruning: the smallest weights of a matrix go. The baseline, without calibration data."""

from dataclasses import dataclass

from torch import Tensor

from wanda_lightning.methods.base import ScoreMethod
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputStatistic


@dataclass(frozen=True)
class Magnitude(ScoreMethod):
    """Score |W|, compared over the whole matrix (Han et al. 2015, arXiv:1506.02626)."""

    statistic = None

    def score(self, weight_OI: Tensor, statistic: InputStatistic | None = None) -> Tensor:
        """Return |W|."""
        return weight_OI.float().abs()

    def mask(self, score_OI: Tensor, pattern: Pattern) -> Tensor:
        """Let all weights of the matrix compete."""
        return pattern.mask(score_OI.reshape(1, -1)).view(score_OI.shape)
