"""Which inputs of a matrix all of its rows can do without, and how the others make up for them.

Optimal Brain Surgeon on whole columns (Meng et al. 2024, OSSCAR, arXiv:2403.12983; Ling et al. 2024, SlimGPT,
arXiv:2412.18110): with P = H^-1, to remove column j costs ||W_:j||^2 / P_jj if the others make up for it, which takes

    W <- W - W_:j P_j: / P_jj,    P <- P - P_:j P_j: / P_jj.

The cheapest column goes, then the cheapest of what is left, one at a time. Where columns go in blocks B, as those of
heads do, the same holds with matrices: to remove a block costs tr(W_B P_BB^-1 W_B^T), and takes W_B P_BB^-1 P_B: from W
and P_:B P_BB^-1 P_B: from P. Single columns change W and P a few at a time, so that most of the work is matrix
products: until then their updates wait as factors of low rank, which changes no result.
At the end the columns that stay are fitted anew: with D the change of these, (W_K + D) X_K is closest to W X for
D = W_R H_RK H_KK^-1, where R are the columns that went.

Shapes: O out features, I in features, K kept, R removed, B of a block.
"""

import torch
from torch import Tensor

from wanda_lightning.precision import full_float32
from wanda_lightning.solvers.factor import Factor, factorize

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
    with full_float32(weight_OI.device):
        w_OI, inverse_II, mask_I = _begin(weight_OI, factor)
        while number:
            waiting = min(BLOCK, number)
            _remove_some(w_OI, inverse_II, mask_I, waiting)
            number -= waiting
    return mask_I


@torch.no_grad()
def remove_blocks(weight_OI: Tensor, factor: Factor, number: int, block: int) -> Tensor:
    """Choose blocks of inputs to remove from a matrix, the others making up for each as it goes.

    Args:
        weight_OI: Weight, shape (out_features, in_features); it does not change.
        factor: Of the damped Hessian of its inputs.
        number: How many blocks are to go, in [0, in_features / block).
        block: How many inputs, one after another, a block has; divides in_features.

    Returns:
        True = kept, shape (in_features,). Ties go by position.

    Raises:
        torch.linalg.LinAlgError: If what is left of the Hessian cannot be factorised.
    """
    with full_float32(weight_OI.device):
        w_OI, inverse_II, mask_I = _begin(weight_OI, factor)
        left = [slice(start, start + block) for start in range(0, len(mask_I), block)]
        for _ in range(number):
            costs = [cost_of_block(w_OI[:, each], inverse_II[each, each]) for each in left]
            gone = left.pop(costs.index(min(costs)))
            rows_BI = torch.cholesky_solve(inverse_II[gone], torch.linalg.cholesky(inverse_II[gone, gone]))
            w_OI -= w_OI[:, gone] @ rows_BI
            inverse_II -= inverse_II[:, gone] @ rows_BI
            mask_I[gone] = False
    return mask_I


def cost_of_block(weight_OB: Tensor, inverse_BB: Tensor) -> float:
    """Return by how much the squared error grows without a block of inputs: tr(W_B P_BB^-1 W_B^T).

    Args:
        weight_OB: Its columns, shape (out_features, B).
        inverse_BB: Its part of the inverse Hessian, shape (B, B).

    Returns:
        The cost.

    Raises:
        torch.linalg.LinAlgError: If the inverse is not positive definite.
    """
    lower_BB = torch.linalg.cholesky(inverse_BB)
    return float(torch.linalg.solve_triangular(lower_BB, weight_OB.t(), upper=False).square().sum())


def _begin(weight_OI: Tensor, factor: Factor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a copy of the weights without dead inputs, the inverse Hessian, and a mask of all."""
    lower_II = factor.lower_II
    w_OI = weight_OI.to(lower_II, copy=True)
    w_OI[:, factor.dead_I] = 0
    identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
    root_II = torch.linalg.solve_triangular(lower_II, identity_II, upper=False)
    return w_OI, root_II @ root_II.t(), torch.ones(w_OI.shape[1], dtype=torch.bool, device=w_OI.device)


def _remove_some(w_OI: Tensor, inverse_II: Tensor, mask_I: Tensor, number: int) -> None:
    """Remove the cheapest inputs one by one, in place; what is left in the columns of removed ones is never read."""
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
        p_I -= u_I.square()
        u_IB[:, b], v_OB[:, b] = u_I, v_O
    inverse_II.addmm_(u_IB, u_IB.t(), alpha=-1)
    w_OI.addmm_(v_OB, u_IB.t(), alpha=-1)


@torch.no_grad()
def fit_to_all_inputs(
    weight_OI: Tensor, mask_I: Tensor, hessian_II: Tensor, damping: float = 0.01, shrinkage: float = 0.0
) -> Tensor:
    """Fit the columns that stay so that the outputs are closest to those of all columns.

    Args:
        weight_OI: Weight with all its columns, shape (out_features, in_features); it does not change.
        mask_I: True = kept, shape (in_features,).
        hessian_II: X^T X up to a scale, symmetric, shape (in_features, in_features), float32 or float64.
        damping: Fraction of the mean diagonal that pulls the columns to what they were, > 0.
        shrinkage: Fraction of each column's own diagonal entry that does so too, >= 0.

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
    lower_KK = factorize(hessian_KI[:, mask_I], damping, shrinkage).lower_II  # H_KK = G^T G
    with full_float32(w_OI.device):
        target_OK = w_OI[:, ~mask_I] @ hessian_KI[:, ~mask_I].t()
        # D G^T G = target
        half_OK = torch.linalg.solve_triangular(lower_KK, target_OK, upper=False, left=False)
        change_OK = torch.linalg.solve_triangular(lower_KK.t(), half_OK, upper=True, left=False)
        return kept_OK + change_OK
