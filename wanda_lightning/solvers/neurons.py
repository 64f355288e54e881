"""Which inputs of a matrix all of its rows can do without, and how the others make up for them.

Optimal Brain Surgeon on whole columns (Meng et al. 2024, OSSCAR, arXiv:2403.12983; Ling et al. 2024, SlimGPT,
arXiv:2412.18110): with P = H^-1, to remove column j costs ||W_:j||^2 / P_jj if the others make up for it, which takes

    W <- W - W_:j P_j: / P_jj,    P <- P - P_:j P_j: / P_jj.

The cheapest column goes, then the cheapest of what is left, one at a time. Between two blocks of columns the updates
wait as factors of low rank, so that most of the work is matrix products; the block size changes no result.
At the end the columns that stay are fitted anew: with D the change of these, (W_K + D) X_K is closest to W X for
D = W_R H_RK H_KK^-1, where R are the columns that went.

Shapes: O out features, I in features, K kept, R removed.
"""

import torch
from torch import Tensor

from wanda_lightning.solvers.factor import Factor, factorize
from wanda_lightning.solvers.precision import full_float32

BLOCK = 32
"""Columns whose updates wait."""


@torch.no_grad()
def remove_inputs(weight_OI: Tensor, factor: Factor, number: int) -> Tensor:
    """Choose inputs to remove from a matrix, the others making up for each as it goes.

    Args:
        weight_OI: Weight, shape (out_features, in_features); it does not change.
        factor: Of the damped Hessian of its inputs.
        number: How many are to go, in [0, in_features).

    Returns:
        True = kept, shape (in_features,). Inputs that were always zero go first; ties go by position.
    """
    lower_II = factor.lower_II
    w_OI = weight_OI.to(lower_II, copy=True)
    w_OI[:, factor.dead_I] = 0
    mask_I = torch.ones(w_OI.shape[1], dtype=torch.bool, device=w_OI.device)
    with full_float32(w_OI.device):
        identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
        root_II = torch.linalg.solve_triangular(lower_II, identity_II, upper=False)
        inverse_II = root_II @ root_II.t()
        while number:
            block = min(BLOCK, number)
            _remove_block(w_OI, inverse_II, mask_I, block)
            number -= block
    return mask_I


def _remove_block(w_OI: Tensor, inverse_II: Tensor, mask_I: Tensor, number: int) -> None:
    """Remove the cheapest inputs one by one; weights, inverse and mask change in place."""
    p_I, norm_I = inverse_II.diagonal().clone(), w_OI.square().sum(0)
    u_IB, v_OB = w_OI.new_zeros(w_OI.shape[1], number), w_OI.new_zeros(w_OI.shape[0], number)
    for b in range(number):
        j = int((norm_I / p_I).masked_fill(~mask_I, torch.inf).argmin())
        mask_I[j] = False
        u_I = inverse_II[:, j] - u_IB[:, :b] @ u_IB[j, :b]
        v_O = w_OI[:, j] - v_OB[:, :b] @ u_IB[j, :b]
        u_I, v_O = u_I / u_I[j].sqrt(), v_O / u_I[j].sqrt()
        along_I = v_O @ w_OI - u_IB[:, :b] @ (v_O @ v_OB[:, :b])
        norm_I = (norm_I - 2 * along_I * u_I + v_O.square().sum() * u_I.square()).clamp_min_(0)
        p_I = (p_I - u_I.square()).masked_fill_(~mask_I, 1)
        u_IB[:, b], v_OB[:, b] = u_I, v_O
    inverse_II.addmm_(u_IB, u_IB.t(), alpha=-1)
    w_OI.addmm_(v_OB, u_IB.t(), alpha=-1)
    inverse_II.diagonal().masked_fill_(~mask_I, 1)
    w_OI[:, ~mask_I] = 0


@torch.no_grad()
def fit_to_all_inputs(weight_OI: Tensor, mask_I: Tensor, hessian_II: Tensor, damping: float = 0.01) -> Tensor:
    """Fit the columns that stay so that the outputs are closest to those of all columns.

    Args:
        weight_OI: Weight with all its columns, shape (out_features, in_features); it does not change.
        mask_I: True = kept, shape (in_features,).
        hessian_II: X^T X up to a scale, symmetric, shape (in_features, in_features), float32 or float64.
        damping: Fraction of the mean diagonal that pulls the columns to what they were, > 0.

    Returns:
        The columns that stay, shape (out_features, K), in the precision of the Hessian.

    Raises:
        torch.linalg.LinAlgError: If the Hessian of the kept inputs cannot be factorised.
    """
    w_OI = weight_OI.to(hessian_II)
    kept_OK = w_OI[:, mask_I]
    if bool(mask_I.all()):
        return kept_OK
    hessian_KI = hessian_II[mask_I]
    lower_KK = factorize(hessian_KI[:, mask_I], damping).lower_II  # H_KK = G^T G
    with full_float32(w_OI.device):
        target_OK = w_OI[:, ~mask_I] @ hessian_KI[:, ~mask_I].t()
        # D G^T G = target
        half_OK = torch.linalg.solve_triangular(lower_KK, target_OK, upper=False, left=False)
        change_OK = torch.linalg.solve_triangular(lower_KK.t(), half_OK, upper=True, left=False)
        return kept_OK + change_OK
