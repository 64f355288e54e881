"""Which scores are the lowest of their group, exactly as many as asked for, and fast.

Masks are boolean, True = kept. Shapes: G comparison groups, N scores in a group.
"""

import functools

import torch
from torch import Tensor


def prune_lowest(score_GN: Tensor, count: int) -> Tensor:
    """Mask out exactly ``count`` lowest scores of each row; among equal scores the first positions go.

    Args:
        score_GN: Scores, shape (groups, scores in a group).
        count: How many go, in [0, N].

    Returns:
        The mask, the same shape.
    """
    if count == 0:
        return torch.ones_like(score_GN, dtype=torch.bool)
    if score_GN.itemsize < 4:
        score_GN = score_GN.float()  # exact, and sorted faster
    threshold_G1 = _kth_lowest(score_GN, count)
    pruned_GN = score_GN <= threshold_G1
    if int(pruned_GN.count_nonzero()) != count * threshold_G1.numel():
        tie_GN = score_GN == threshold_G1
        surplus_G1 = pruned_GN.sum(-1, keepdim=True) - count
        pruned_GN &= ~tie_GN | (tie_GN.cumsum(-1) <= tie_GN.sum(-1, keepdim=True) - surplus_G1)
    return ~pruned_GN


def _kth_lowest(score_GN: Tensor, count: int) -> Tensor:
    """Find the ``count``-th lowest score of each row, shape (groups, 1), in whichever way is the fastest."""
    if score_GN.shape[-1] <= 8:
        # Bubble sort, as far as it is needed: a few operations along the many rows.
        columns = list(score_GN.unbind(-1))
        for _ in range(count - 1):
            for j in range(len(columns) - 1, 0, -1):
                columns[j], columns[j - 1] = columns[j].maximum(columns[j - 1]), columns[j].minimum(columns[j - 1])
            del columns[0]
        return functools.reduce(torch.minimum, columns).unsqueeze(-1)
    if score_GN.dtype == torch.float32:
        # Floats that are not negative sort like their bits, which are faster to compare. In a single long row a
        # histogram of the leading 17 leaves few to choose from.
        bits_GN = score_GN.contiguous().view(torch.int32)
        if int(bits_GN.min()) >= 0:
            if len(bits_GN) == 1:
                leading_GN = bits_GN >> 15
                up_to = leading_GN[0].bincount().cumsum(0)
                at = int(torch.searchsorted(up_to, count))
                count -= int(up_to[at - 1]) if at else 0
                bits_GN = bits_GN[leading_GN == at].unsqueeze(0)
            elif bits_GN.device.type == "cpu":  # a fifth to a third faster than the k-th value
                lowest_GK = bits_GN.topk(count, dim=-1, largest=False, sorted=False).values
                return lowest_GK.amax(-1, keepdim=True).view(torch.float32)
            return _kth_value(bits_GN, count).view(torch.float32)
    return _kth_value(score_GN, count)


def _kth_value(score_GN: Tensor, count: int) -> Tensor:
    if torch.are_deterministic_algorithms_enabled():
        # CUDA's kthvalue is refused then, as its indices vary, which nobody asks for here.
        return score_GN.sort(dim=-1).values[:, count - 1 : count]
    return score_GN.kthvalue(count, dim=-1, keepdim=True).values
