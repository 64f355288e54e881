"""Optimal Brain Surgeon one weight at a time, in float64: the truth that the solver and its methods are held to."""

import torch
from torch import Tensor


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def brute_force(weight: Tensor, hessian: Tensor, choose) -> tuple[Tensor, Tensor]:
    """Remove one weight at a time; each time the later weights of its row take the closed-form optimum.

    ``choose(w, score, j)`` is asked at every column j, with all weights as they are and the error that removing each
    one alone would leave, and returns which to remove (True) in columns start to stop, or None.
    """
    w = weight.double().clone()
    mask = torch.ones_like(w, dtype=torch.bool)
    hessian = damped(hessian)
    columns = w.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(columns):
        chosen = choose(w, w.square() / cost, j)
        if chosen is not None:
            start, stop, removed = chosen
            mask[:, start:stop] = ~removed
        for row in range(w.shape[0]):
            if not mask[row, j]:
                w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][:, 0]
                w[row, j] = 0
    return w, mask
