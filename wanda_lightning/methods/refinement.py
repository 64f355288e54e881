"""``refine``: after a method has chosen, the weights that it keeps are fitted to the outputs of the dense ones.

Shapes: O out features, I in features.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from wanda_lightning.solvers import fit_kept_weights
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputHessian, InputStatistic

Prune = Callable[[Any, Tensor, InputStatistic | None, Pattern], Tensor]


def refined(prune: Prune) -> Prune:
    """Let ``self.refine`` steps of conjugate gradients follow a method's ``prune``, all of it without gradients."""

    @wraps(prune)
    @torch.no_grad()
    def prune_and_refine(self: Any, weight_OI: Tensor, statistic: InputStatistic | None, pattern: Pattern) -> Tensor:
        if not self.refine:
            return prune(self, weight_OI, statistic, pattern)
        if not isinstance(statistic, InputHessian):
            raise ValueError(f"{self} has refine, which needs InputHessian as its statistic")
        dense_OI = weight_OI.clone()
        mask_OI = prune(self, weight_OI, statistic, pattern)
        hessian_II = statistic.compute().to(weight_OI.device)
        fit_kept_weights(weight_OI, dense_OI, mask_OI, hessian_II, self.refine)
        return mask_OI

    return prune_and_refine
