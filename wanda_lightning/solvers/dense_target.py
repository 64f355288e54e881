"""The weight with which a linear gives on the pruned model's inputs what it gives in the dense model.

With X the inputs in the dense model, X~ those in the pruned one, H = X~^T X~, and Y what the linear is to give, W + D^T
with D = H^-1 X~^T (Y - X~ W^T) is the least-squares solution; every method can prune that weight with H as it prunes W.
On few tokens D repairs what it should not. So D is damped, and scaled by the share alpha of it that is best on tokens
that were held out: their error is a parabola in alpha (QEP, Arai and Ichikawa 2025, arXiv:2504.09629, damps it alike,
with one alpha for the whole model).

Shapes: O out features, I in features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wanda_lightning.precision import full_float32
from wanda_lightning.solvers.factor import Factor


class Moments(NamedTuple):
    """Sums over some tokens.

    Attributes:
        hessian_II: X~^T X~, symmetric, shape (in_features, in_features).
        lost_IO: X~^T (Y - X~ W^T), shape (in_features, out_features).
    """

    hessian_II: Tensor
    lost_IO: Tensor


@torch.no_grad()
def fit_to_dense(
    weight_OI: Tensor, whole: Moments, held_out: Moments, factor: Factor, train_factor: Factor
) -> tuple[Tensor, float]:
    """Move a weight towards the dense model's outputs, as far as that serves tokens that it was not fitted to.

    Args:
        weight_OI: The dense weight W, shape (out_features, in_features).
        whole: Sums over all tokens.
        held_out: Sums over those of them that are held out while alpha is chosen.
        factor: Of the whole Hessian, damped.
        train_factor: Of the Hessian of the tokens that are not held out, damped alike.

    Returns:
        W + alpha D^T, fitted to all tokens, in the dtype of the sums; and alpha, in [0, 1].
    """
    w_OI = weight_OI.to(whole.hessian_II)
    alpha = 0.0
    if bool(held_out.lost_IO.any()):
        fit_IO = train_factor.solve(whole.lost_IO - held_out.lost_IO)
        with full_float32(fit_IO.device):
            curvature = float((fit_IO * (held_out.hessian_II @ fit_IO)).sum())
        slope = float((fit_IO * held_out.lost_IO).sum())
        alpha = min(1.0, slope / curvature) if slope > 0 and curvature > 0 else 0.0
    return (w_OI + alpha * factor.solve(whole.lost_IO).t() if alpha else w_OI), alpha
