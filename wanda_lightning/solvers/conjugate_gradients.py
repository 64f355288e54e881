"""The best kept weights for a given mask, by conjugate gradients.

With D = W - W_dense and H = X^T X, each output row loses ||D X||^2 = D H D^T. Over the kept weights of the row this is
a least-squares problem of its own; conjugate gradients solve all of them at once, a matrix product a step, with the
diagonal of H as preconditioner (Meng et al. 2024, ALPS, arXiv:2406.07831, algorithm 2; here every row has its own step
sizes). No matrix is factorised, so H need not be damped.

Shapes: O out features, I in features.
"""

import torch
from torch import Tensor

from wanda_lightning.precision import full_float32


@torch.no_grad()
def fit_kept_weights(
    weight_OI: Tensor, dense_OI: Tensor, mask_OI: Tensor, hessian_II: Tensor, steps: int, tolerance: float = 1e-5
) -> None:
    """Bring the kept weights closer to the least-squares solution, in place.

    Weights of dead inputs (:func:`dead_inputs`) stay as they are, and so do rows whose error did not fall, once rounded
    to the weight's dtype.

    Args:
        weight_OI: Pruned weight to start from, shape (out_features, in_features), any floating dtype and any strides.
        dense_OI: Weight whose outputs are aimed at, same shape.
        mask_OI: True = kept, same shape.
        hessian_II: X^T X up to a scale, symmetric, shape (in_features, in_features), float32 or float64.
        steps: At most so many.
        tolerance: No more steps for a row once its (preconditioned) gradient has shrunk to this fraction of its dense
            weights, both weighted with the norms of their inputs.
    """
    diagonal_I = hessian_II.diagonal()
    dead_I = dead_inputs(diagonal_I)
    fixed_OI = ~mask_OI | dead_I
    inverse_I = diagonal_I.masked_fill(dead_I, 1).reciprocal()
    dense_OI = dense_OI.to(hessian_II)
    w_OI = weight_OI.to(hessian_II, copy=True)
    enough_O1 = tolerance**2 * _row_sum(dense_OI.square(), diagonal_I)
    with full_float32(hessian_II.device):
        gradient_OI = (dense_OI - w_OI) @ hessian_II
        error_O1 = _row_sum(dense_OI - w_OI, gradient_OI)
        residual_OI = gradient_OI.masked_fill_(fixed_OI, 0)
        scaled_OI = residual_OI * inverse_I
        direction_OI = scaled_OI.clone()
        size_O1 = _row_sum(residual_OI, scaled_OI)
        for _ in range(steps):
            unsolved_O1 = size_O1 > enough_O1
            if not unsolved_O1.any():
                break
            image_OI = (direction_OI @ hessian_II).masked_fill_(fixed_OI, 0)
            # The others stay: what is left of their gradients is rounding, and where tokens are few it leads far away.
            step_O1 = _ratio(size_O1.where(unsolved_O1, 0), _row_sum(direction_OI, image_OI))
            w_OI.addcmul_(step_O1, direction_OI)
            residual_OI.addcmul_(step_O1, image_OI, value=-1)
            torch.mul(residual_OI, inverse_I, out=scaled_OI)
            before_O1, size_O1 = size_O1, _row_sum(residual_OI, scaled_OI)
            direction_OI.mul_(_ratio(size_O1, before_O1)).add_(scaled_OI)
        change_OI = dense_OI - w_OI.to(weight_OI.dtype).to(w_OI)
        better_O1 = _row_sum(change_OI, change_OI @ hessian_II) < error_O1
    weight_OI.copy_(torch.where(better_O1 & ~dead_I, w_OI, weight_OI))


def dead_inputs(diagonal_I: Tensor) -> Tensor:
    """Find the inputs that were always zero, or so small that float32 loses their squares beside those of the others.

    To make up for others their weights would have to be so much larger, and spoil the outputs where the inputs are not.

    Args:
        diagonal_I: Of X^T X up to a scale, shape (in_features,).

    Returns:
        True = dead, the same shape.
    """
    return diagonal_I <= torch.finfo(torch.float32).eps * diagonal_I.mean()


def _row_sum(a_OI: Tensor, b_OI: Tensor) -> Tensor:
    """Multiply and sum each row, shape (O, 1)."""
    return (a_OI * b_OI).sum(1, keepdim=True)


def _ratio(above_O1: Tensor, below_O1: Tensor) -> Tensor:
    """Divide; 0 where there is nothing left to divide by, in rows that are solved."""
    return torch.where(below_O1 > 0, above_O1 / below_O1, 0)
