"""Mask and weights together, by the alternating direction method of multipliers (ADMM) with a mask that grows.

Fast and Effective Weight Update for Pruned Large Language Models (Boza 2024, arXiv:2401.02938); see also ALPS (Meng et
al. 2024, arXiv:2406.07831). With inputs scaled to norm 1, V the weights and C the correlations of the inputs, the
outputs lose (V - V_dense) C (V - V_dense)^T. Three steps in turn lower it over all V that are zero outside the mask M:

    Z = M (V + U)        the nearest weights that obey the mask; M keeps the largest |V + U|
    U = U + V - Z        by how much V has disobeyed so far
    V = (V_dense C + rho (Z - U)) (C + rho 1)^-1

The mask prunes few weights at first and all of them at the end of a cubic schedule. |V| at the start is Wanda's score.
One inverse serves all steps; each step is a matrix product.

Shapes: O out features, I in features.
"""

import torch
from torch import Tensor

from wanda_lightning.solvers.precision import full_float32
from wanda_lightning.sparsity import Pattern, Unstructured


@torch.no_grad()
def prune_with_admm(
    weight_OI: Tensor,
    hessian_II: Tensor,
    pattern: Pattern,
    steps: int = 30,
    mask_steps: int = 20,
    rho: float = 1.0,
    damping: float = 0.01,
) -> Tensor:
    """Choose weights and update those that stay, in place.

    Args:
        weight_OI: Weight, shape (out_features, in_features), any floating dtype and any strides.
        hessian_II: X^T X up to a scale, symmetric, shape (in_features, in_features), float32 or float64.
        pattern: How many weights stay; unstructured weights compete over the whole matrix.
        steps: How many in all, at least ``mask_steps``.
        mask_steps: In so many of them the mask grows to its full sparsity; it is fixed afterwards.
        rho: How strongly weights are drawn to the mask, relative to the curvature of a single weight, > 0.
        damping: By how much correlations between inputs count less: all but the diagonal is divided by 1 + damping.

    Returns:
        Boolean mask of the weight's shape, True = kept.
    """
    norm_I = hessian_II.diagonal().sqrt()
    dead_I = norm_I == 0
    scale_I = norm_I.masked_fill(dead_I, 1)
    correlation_II = (hessian_II / scale_I).div_(scale_I.unsqueeze(1) * (1 + damping)).fill_diagonal_(1)
    v_OI = weight_OI.to(hessian_II) * norm_I
    u_OI, mask_OI = torch.zeros_like(v_OI), torch.ones_like(v_OI, dtype=torch.bool)
    with full_float32(hessian_II.device):
        target_OI = v_OI @ correlation_II
        correlation_II.diagonal().add_(rho)
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(correlation_II))
        target_OI = target_OI @ inverse_II
        for step in range(1, steps + 1):
            sum_OI = v_OI + u_OI
            if step <= mask_steps:
                mask_OI = _growing_mask(sum_OI.abs(), pattern, step / mask_steps)
            torch.mul(sum_OI, ~mask_OI, out=u_OI)  # U + V - Z
            z_less_u_OI = torch.where(mask_OI, sum_OI, -sum_OI)
            torch.addmm(target_OI, z_less_u_OI, inverse_II, alpha=rho, out=v_OI)
    kept_OI = (v_OI + u_OI) / scale_I
    weight_OI.copy_(torch.where(dead_I, weight_OI, kept_OI.to(weight_OI.dtype)).masked_fill_(~mask_OI, 0))
    return mask_OI


def _growing_mask(score_OI: Tensor, pattern: Pattern, progress: float) -> Tensor:
    """Prune, of what the pattern would prune, the lowest of the matrix: a share 1 - (1 - progress)^3 of it."""
    score_1N = score_OI.reshape(1, -1)
    mask_1N = pattern.mask(score_1N)
    if progress < 1:
        share = Unstructured(pattern.sparsity * (1 - (1 - progress) ** 3))
        mask_1N = share.mask(score_1N.masked_fill_(mask_1N, torch.inf))
    return mask_1N.view_as(score_OI)
