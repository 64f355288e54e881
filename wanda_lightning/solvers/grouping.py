"""Which inputs stand together in the groups of an N:M pattern, so that the least is lost.

Weights compete within groups of m inputs. Where the inputs may stand in any order, a group should not hold inputs whose
weights are large in the same rows. (Channel permutation: Pool and Yu, NeurIPS 2021; for language models RIA, Zhang et
al., ICLR 2024.)

Shapes: O out features, I in features, G groups.
"""

import torch
from torch import Tensor

from wanda_lightning.precision import longest_float
from wanda_lightning.sparsity import SemiStructured

ENOUGH = 1e-2
"""The exchange ends when a round of it has lowered what is lost by less than this share."""


@torch.no_grad()
def grouped(score_OI: Tensor, pattern: SemiStructured) -> Tensor:
    """Find an order of the inputs in which an N:M pattern loses a small sum of scores.

    In turns, the inputs at one of the m places of all groups are exchanged among these: while two groups lose less with
    the inputs of that place exchanged, they are, the pairs that gain most of those that have no group in common at
    once. What a group would lose with another input is exact: the m - n - 1 lowest scores of the others, and the lower
    one of the input's and their next.

    Args:
        score_OI: What is lost with each weight, >= 0, shape (out_features, in_features); a multiple of m inputs.
        pattern: How many of how many stay.

    Returns:
        The inputs in their new order, shape (in_features,); what is lost then is not more than in the order given.
    """
    order_GM = torch.arange(score_OI.shape[1], device=score_OI.device).view(-1, pattern.m)
    lost = first = _lost(score_OI, order_GM, pattern)
    while lost:
        for place in range(pattern.m):
            others_OGM = score_OI[:, torch.cat([order_GM[:, :place], order_GM[:, place + 1 :]], 1)]
            lowest_OGP = others_OGM.sort(-1).values[..., : pattern.m - pattern.n]
            next_OG = lowest_OGP[..., -1]
            moved_OG = score_OI[:, order_GM[:, place]]
            # Of a group (rows) with an input (columns), up to a sum of its own.
            loss_GG = _least_sums(next_OG, moved_OG)
            order_GM[:, place] = order_GM[_exchanged(loss_GG), place]
        before, lost = lost, _lost(score_OI, order_GM, pattern)
        if not before - lost >= ENOUGH * first:  # also where sums have overflowed
            break
    return order_GM.flatten()


def _lost(score_OI: Tensor, order_GM: Tensor, pattern: SemiStructured) -> float:
    lowest_OGP = score_OI[:, order_GM].sort(-1).values[..., : pattern.m - pattern.n]
    return float(lowest_OGP.sum(dtype=longest_float(score_OI.device)))


def _least_sums(one_OG: Tensor, other_OG: Tensor) -> Tensor:
    """Sum the lower ones of each column of one matrix and each of another over the rows."""
    return torch.stack([torch.minimum(one_OG[:, g : g + 1], other_OG).sum(0) for g in range(one_OG.shape[1])])


def _exchanged(loss_GG: Tensor) -> Tensor:
    """Exchange pairs of inputs between groups as long as one of the exchanges lowers the sum of the diagonal."""
    inputs_G = groups = torch.arange(len(loss_GG), device=loss_GG.device)
    while True:
        now_G = loss_GG.diagonal()
        gain_GG = now_G[:, None] + now_G - loss_GG - loss_GG.t()
        most_G, partner_G = gain_GG.max(1)
        least_G = 1e-6 * (now_G.mean() + now_G + now_G[partner_G])  # more than rounding feigns: so this comes to an end
        agreed_G = (partner_G[partner_G] == groups) & (most_G > least_G)
        if not agreed_G.any():
            return inputs_G
        swap_G = torch.where(agreed_G, partner_G, groups)
        inputs_G, loss_GG = inputs_G[swap_G], loss_GG[:, swap_G]
