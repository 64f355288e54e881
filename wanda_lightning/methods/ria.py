"""RIA: relative importance and activations (Zhang et al. 2024, ICLR, https://openreview.net/forum?id=Tr0lPx9woF).

Shapes: O out features, I in features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wanda_lightning.arguments import number_not_below_0
from wanda_lightning.methods.base import ScoreMethod
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputNorm, InputStatistic


@dataclass(frozen=True)
class RIA(ScoreMethod):
    """Score (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2 ^ power, compared over the whole matrix.

    A weight counts by its share of what leaves its input and of what enters its output, so that no input and no output
    loses all its weights. N:M patterns compare within each group of m.

    Args:
        power: Exponent of the inputs' norms, >= 0; the paper's is 0.5, and 0 leaves the activations out.

    Raises:
        ValueError: If the power is not a finite number of at least 0.
    """

    statistic = InputNorm
    power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        number_not_below_0("power", self.power)

    def score(self, weight_OI: Tensor, statistic: InputStatistic | None) -> Tensor:
        """Return relative importance times the power of the norm."""
        assert isinstance(statistic, InputNorm)
        size_OI = weight_OI.float().abs()
        tiny = torch.finfo(size_OI.dtype).tiny  # a sum of zeros divides zeros only
        relative_OI = size_OI / size_OI.sum(0, keepdim=True).clamp_min(tiny)
        relative_OI += size_OI / size_OI.sum(1, keepdim=True).clamp_min(tiny)
        return relative_OI * statistic.compute().to(weight_OI.device).pow(self.power)

    def mask(self, score_OI: Tensor, pattern: Pattern) -> Tensor:
        """Let all weights of the matrix compete."""
        return pattern.mask(score_OI.reshape(1, -1)).view(score_OI.shape)
