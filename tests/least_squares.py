"""The layer-wise problem in float64, a row at a time: what solvers of kept weights are compared with."""

import torch
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian_of(features: int, tokens: int, dead: tuple[int, ...] = ()) -> Tensor:
    x = random(tokens, features, seed=1) @ (0.3 * random(features, features, seed=2) + torch.eye(features).double())
    x[:, list(dead)] = 0
    return x.t() @ x


def normal_equations(start: Tensor, dense: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Solve every row on its own: H_SS w_S = (H w_dense)_S, with S the kept weights of live inputs."""
    solution = start.clone()
    for row, kept in enumerate(mask & (hessian.diagonal() > 0)):
        support = kept.nonzero().flatten()
        if len(support):
            right = (hessian @ dense[row])[support]
            solution[row, support] = torch.linalg.solve(hessian[support][:, support], right)
    return solution


def error(weight: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    return ((weight - dense) @ hessian * (weight - dense)).sum(1)
