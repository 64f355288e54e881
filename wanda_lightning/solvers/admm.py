"""Mask and weights together, by the alternating direction method of multipliers (ADMM) with a mask that grows.

Fast and Effective Weight Update for Pruned Large Language Models (Boza 2024, arXiv:2401.02938); see also ALPS (Meng et
al. 2024, arXiv:2406.07831). With inputs scaled to norm 1, V the weights and C the correlations of the inputs, the
outputs lose (V - V_dense) C (V - V_dense)^T. Three steps in turn lower it over all V that are zero outside the mask M:

    Z = M (V + U)        the nearest weights that obey the mask; M keeps the largest |V + U|
    U = U + V - Z        by how much V has disobeyed so far
    V = (V_dense C + rho (Z - U)) (C + rho 1)^-1

The mask grows to its full sparsity by a cubic schedule. |V| at the start is Wanda's score. Where rho is small, pruned
weights come back easily and the search is wide; it rises in stages (as in ALPS), each of which takes one inverse. A
step is one matrix product. At rho = 1 a weight that is coupled to no other scores |V_dense|, pruned or not.

Shapes: O out features, I in features.
"""

import torch
from torch import Tensor

from wanda_lightning.precision import full_float32
from wanda_lightning.solvers.conjugate_gradients import dead_inputs
from wanda_lightning.sparsity import Pattern, Unstructured, zero_where_pruned

STAGES = 8
"""In so many rho rises; in the last of them where there are fewer steps."""
RISE = 30
"""By this factor, from the first stage to the last."""


@torch.no_grad()
def prune_with_admm(
    weight_OI: Tensor,
    hessian_II: Tensor,
    pattern: Pattern,
    steps: int = 40,
    rho: float = 1.0,
    damping: float = 0.01,
) -> Tensor:
    """Choose weights and update those that stay, in place.

    Args:
        weight_OI: Weight, shape (out_features, in_features), any floating dtype and any strides.
        hessian_II: X^T X up to a scale, symmetric, shape (in_features, in_features), float32 or float64.
        pattern: How many weights stay; unstructured weights compete over the whole matrix.
        steps: Number of steps in which the mask grows to its full sparsity, >= 1.
        rho: How strongly weights are drawn to the mask at the end, relative to the curvature of a single weight, > 0.
        damping: By how much correlations between inputs count less: all but the diagonal is divided by 1 + damping.

    Returns:
        Boolean mask of the weight's shape, True = kept.
    """
    dead_I = dead_inputs(hessian_II.diagonal())
    norm_I = hessian_II.diagonal().sqrt()
    scale_I = norm_I.masked_fill(dead_I, torch.inf)  # they are coupled to none
    correlation_II = (hessian_II / scale_I).div_(scale_I.unsqueeze(1) * (1 + damping)).fill_diagonal_(1)
    v_OI = weight_OI.to(hessian_II) * norm_I
    u_OI, last_rho, stages = torch.zeros_like(v_OI), None, min(STAGES, steps)
    with full_float32(hessian_II.device):
        target_OI = v_OI @ correlation_II
        for step in range(steps):
            stage_rho = rho * RISE ** ((STAGES - stages + step * stages // steps) / (STAGES - 1) - 1)
            if stage_rho != last_rho:
                inverse_II = _inverse(correlation_II, stage_rho)
                fit_OI = target_OI @ inverse_II
                u_OI *= (last_rho or 0) / stage_rho  # rho U, the gradient, is what goes on
                last_rho = stage_rho
            sum_OI = v_OI + u_OI
            mask_OI = _growing_mask(sum_OI.abs(), pattern, (step + 1) / steps)
            torch.mul(sum_OI, ~mask_OI, out=u_OI)  # U + V - Z
            z_less_u_OI = torch.where(mask_OI, sum_OI, -sum_OI)
            torch.addmm(fit_OI, z_less_u_OI, inverse_II, alpha=stage_rho, out=v_OI)
    if not mask_OI.all():  # else nothing was to go, and no weight is rounded anew
        weight_OI.copy_(torch.where(dead_I, weight_OI, v_OI / scale_I))  # where weights are kept, U is 0
        zero_where_pruned(weight_OI, mask_OI)
    return mask_OI


def _inverse(matrix_II: Tensor, rho: float) -> Tensor:
    """Invert a matrix with rho added to its diagonal."""
    shifted_II = matrix_II.clone()
    shifted_II.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted_II))


def _growing_mask(score_OI: Tensor, pattern: Pattern, progress: float) -> Tensor:
    """Prune a share 1 - (1 - progress)^3 of what the pattern would prune: the lowest of the whole matrix."""
    score_1N = score_OI.reshape(1, -1)
    mask_1N = pattern.mask(score_1N)
    if progress < 1:
        share = Unstructured(pattern.sparsity * (1 - (1 - progress) ** 3))
        mask_1N = share.mask(score_1N.masked_fill(mask_1N, torch.inf))
    return mask_1N.view_as(score_OI)
