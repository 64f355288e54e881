"""Optimal Brain Surgeon, column by column: remove weights and let the later ones of their row make up for it.

SparseGPT (arXiv:2301.00774, algorithm 1) and Ablate, which differ in who is removed. With H = G^T G (see factor.py),
removing the weight w_j of a row leaves the error e_j = w_j / U_jj, and the best later weights are w_k - e_j U_jk.
Over all columns, the errors E and the changes D = before - after of the weights, transposed, obey E = G D, and the
error of a weight that stays is 0. Hence what a block of columns owes to all earlier ones is one matrix product with
rows of G, made when the block is reached:

    w = v + M (G[block, :start] D[:start])        with M = G[block, block]^-1 = U[block, block]^T

Within the block the errors are those of the published loop. Weights are transposed, so that a column is contiguous.

Shapes: O out features, I in features, B columns of a block, S columns of a group that is chosen together.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wanda_lightning.precision import full_float32
from wanda_lightning.solvers.factor import Factor
from wanda_lightning.sparsity import Pattern, SemiStructured

SUB_BLOCK = 16
"""Columns that are visited one at a time between two matrix products."""
FUSED_BLOCK = 512
"""The widest block whose columns the GPU kernel holds in registers."""
FUSED_DEVICES = ["cuda"]
"""Types of device that the kernel is made for."""


@torch.no_grad()
def prune_with_mask(weight_OI: Tensor, factor: Factor, mask_OI: Tensor, block_size: int = 128) -> None:
    """Remove given weights and update those that stay, in place.

    Args:
        weight_OI: Weight, shape (out_features, in_features), any floating dtype and any strides.
        factor: Factor of the damped Hessian of the inputs.
        mask_OI: True = kept, shape of the weight.
        block_size: Columns between two updates of the columns after them. Changes the speed, not the result.
    """
    pruned_IO = ~mask_OI.t().contiguous()

    def prune_block(w_BO: Tensor, start: int, inverse_BB: Tensor) -> None:
        _remove(w_BO, inverse_BB, pruned_IO[start : start + len(w_BO)])

    _for_each_block(weight_OI, factor, block_size, prune_block)


@torch.no_grad()
def prune_with_scores(
    weight_OI: Tensor, factor: Factor, importance_I: Tensor, pattern: Pattern, block_size: int = 128
) -> Tensor:
    """Choose weights as they are reached, by |updated weight| * importance of the input, and remove those, in place.

    An unstructured pattern chooses within each block, over all its rows, once the earlier blocks are done; N:M chooses
    in each group of m columns, once all earlier columns are done.

    Args:
        weight_OI: Weight, shape (out_features, in_features), any floating dtype and any strides.
        factor: Factor of the damped Hessian of the inputs.
        importance_I: Factor of each input in the score, >= 0, shape (in_features,).
        pattern: Which weights compete, and how many stay.
        block_size: Columns of a block; a multiple of m for N:M.

    Returns:
        Boolean mask of the weight's shape, True = kept.
    """
    pruned_IO = torch.empty(weight_OI.shape[::-1], dtype=torch.bool, device=weight_OI.device)
    importance_I1 = importance_I.to(weight_OI.device, factor.lower_II.dtype).unsqueeze(1)

    def prune_block(w_BO: Tensor, start: int, inverse_BB: Tensor) -> None:
        block = slice(start, start + len(w_BO))
        if isinstance(pattern, SemiStructured):
            pruned_IO[block] = _remove_n_of_m(w_BO, inverse_BB, importance_I1[block], pattern)
        else:
            score_BO = w_BO.abs() * importance_I1[block]
            pruned_IO[block] = ~pattern.mask(score_BO.reshape(1, -1)).view_as(score_BO)
            _remove(w_BO, inverse_BB, pruned_IO[block])

    _for_each_block(weight_OI, factor, block_size, prune_block)
    return pruned_IO.logical_not_().t().contiguous()


@torch.inference_mode()  # the many small operations cost a tenth less than under no_grad; nothing made here leaves
def _for_each_block(
    weight_OI: Tensor, factor: Factor, block_size: int, prune_block: Callable[[Tensor, int, Tensor], None]
) -> None:
    """Bring each block up to date with the earlier ones, hand it to ``prune_block(w, start, M)``, and store it."""
    lower_II = factor.to(weight_OI.device).lower_II
    dtype = torch.promote_types(lower_II.dtype, weight_OI.dtype)  # weights that stay as they are lose no bits
    lower_II = lower_II.to(dtype)
    weight_IO = weight_OI.t().to(dtype, copy=True, memory_format=torch.contiguous_format)
    change_IO = torch.empty_like(weight_IO)
    with full_float32(weight_IO.device):
        for start in range(0, len(weight_IO), block_size):
            v_BO = weight_IO[start : start + block_size]
            stop = start + len(v_BO)
            inverse_BB = _invert(lower_II[start:stop, start:stop])
            w_BO = v_BO.clone()
            if start:
                w_BO.addmm_(inverse_BB, lower_II[start:stop, :start] @ change_IO[:start])
            prune_block(w_BO, start, inverse_BB)
            torch.sub(v_BO, w_BO, out=change_IO[start:stop])
            v_BO.copy_(w_BO)
    weight_OI.copy_(weight_IO.t())


def _invert(lower_BB: Tensor) -> Tensor:
    """Invert a lower triangular block."""
    identity_BB = torch.eye(len(lower_BB), dtype=lower_BB.dtype, device=lower_BB.device)
    return torch.linalg.solve_triangular(lower_BB, identity_BB, upper=False)


def _remove(w_BO: Tensor, inverse_BB: Tensor, pruned_BO: Tensor) -> None:
    """Remove given weights of a block and update the later columns of the block."""
    if _fused(w_BO, inverse_BB, pruned_BO):
        return
    removed_BO = _as_numbers(pruned_BO, w_BO.dtype)
    rate_BO = removed_BO / inverse_BB.diagonal().unsqueeze(1)
    _sweep(w_BO, inverse_BB, SUB_BLOCK, lambda w_SO, start: rate_BO[start : start + len(w_SO)])
    w_BO.addcmul_(w_BO, removed_BO, value=-1)


def _remove_n_of_m(w_BO: Tensor, inverse_BB: Tensor, importance_B1: Tensor, pattern: SemiStructured) -> Tensor:
    """Remove the lowest m - n weights of each group of m, chosen when the group is reached; return which (True)."""
    pruned_BO = torch.empty_like(w_BO, dtype=torch.bool)
    if _fused(w_BO, inverse_BB, pruned_BO, importance_B1, pattern.n, pattern.m):
        return pruned_BO
    rate_B1 = inverse_BB.diagonal().reciprocal().unsqueeze(1)

    def choose(w_SO: Tensor, start: int) -> Tensor:
        group = slice(start, start + len(w_SO))
        score_SO = w_SO.abs() * importance_B1[group]
        torch.logical_not(pattern.mask(score_SO.t()).t(), out=pruned_BO[group])
        return _as_numbers(pruned_BO[group], w_SO.dtype).mul_(rate_B1[group])

    _sweep(w_BO, inverse_BB, pattern.m, choose)
    w_BO.addcmul_(w_BO, _as_numbers(pruned_BO, w_BO.dtype), value=-1)
    return pruned_BO


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask into ones and zeros; by way of bytes, which the CPU converts several times as fast as booleans."""
    return mask.view(torch.uint8).to(dtype)


def _fused(
    w_BO: Tensor, inverse_BB: Tensor, pruned_BO: Tensor, importance_B1: Tensor | None = None, n: int = 0, m: int = 0
) -> bool:
    """Run the block as one GPU kernel, if there is one for it here; tell whether it ran."""
    if w_BO.device.type not in FUSED_DEVICES or w_BO.dtype != torch.float32 or len(w_BO) > FUSED_BLOCK:
        return False
    from wanda_lightning.solvers import triton_obs

    if not triton_obs.works(w_BO.device, len(w_BO), n, m):
        return False
    triton_obs.sweep(w_BO, inverse_BB, pruned_BO, importance_B1, n, m)
    return True


def _sweep(w_BO: Tensor, inverse_BB: Tensor, group: int, rate: Callable[[Tensor, int], Tensor]) -> None:
    """Visit the columns of a block in order; each ends as it stands when its turn comes.

    Args:
        w_BO: Weights, changed in place.
        inverse_BB: M of the block.
        group: Columns that are chosen together.
        rate: Given the up-to-date weights of a group and where it starts, 1 / U_jj for weights to remove, 0 for the
            others.
    """
    error_BO = torch.zeros_like(w_BO)
    coupling_BB = inverse_BB.tril(-1)
    w, error = w_BO.unbind(), error_BO.unbind()
    sub_block = group * max(SUB_BLOCK // group, 1)
    for start in range(0, len(w_BO), group):
        stop = min(start + group, len(w_BO))
        first = start - start % sub_block
        if start == first > 0:
            ahead = slice(start, start + sub_block)
            w_BO[ahead].addmm_(coupling_BB[ahead, :start], error_BO[:start], alpha=-1)
        w_SO = w_BO[start:stop]
        if start > first:
            w_SO.addmm_(coupling_BB[start:stop, first:start], error_BO[first:start], alpha=-1)
        rate_SO = rate(w_SO, start)
        # Errors of columns to come are 0, so every column may read the whole group: fewer, larger operations.
        error_OS, coupling_SS = error_BO[start:stop].t(), coupling_BB[start:stop, start:stop]
        for j, rate_O, coupling_S in zip(range(start, stop), rate_SO.unbind(), coupling_SS.unbind(), strict=True):
            torch.mul(w[j].addmv_(error_OS, coupling_S, alpha=-1), rate_O, out=error[j])
