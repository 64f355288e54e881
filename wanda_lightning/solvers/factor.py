"""The triangular factor of a damped Hessian, from one Cholesky decomposition.

SparseGPT (arXiv:2301.00774) and GPTQ (arXiv:2210.17323) compensate with the upper factor U of the inverse,
H^-1 = U^T U, and compute it in three steps: Cholesky, inverse, Cholesky. With the rows and columns of H in reverse
order one Cholesky is enough: it gives a lower triangular G with H = G^T G, hence H^-1 = G^-1 G^-T and U^T = G^-1.
The solver works with G itself and inverts its diagonal blocks only, so no large triangle is ever inverted.

Shapes: I in features.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from wanda_lightning.precision import full_float32

MAX_DAMPING = 1.0
"""Damping is not raised above this; with the diagonal doubled the problem is no longer the user's."""

BLOCK = 192
"""Columns that are factorised at a time."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factor:
    """A damped Hessian H + damping * mean(diag H) * 1 + shrinkage * diag H = G^T G, ready for the solver.

    Attributes:
        lower_II: G, lower triangular, shape (in_features, in_features).
        dead_I: True where the input was always zero: such a weight changes no output.
        damping: The fraction of the mean diagonal that was added; more than asked for if G did not exist otherwise.
    """

    lower_II: Tensor
    dead_I: Tensor
    damping: float

    def solve(self, right_IO: Tensor) -> Tensor:
        """Return (G^T G)^-1 times a matrix, shape (in_features, O)."""
        with full_float32(right_IO.device):
            half_IO = torch.linalg.solve_triangular(self.lower_II.t(), right_IO, upper=True)
            return torch.linalg.solve_triangular(self.lower_II, half_IO, upper=False)

    def to(self, device: torch.device) -> "Factor":
        """Return the factor on another device."""
        return Factor(self.lower_II.to(device), self.dead_I.to(device), self.damping)


@torch.no_grad()
def factorize(hessian_II: Tensor, damping: float = 0.01, shrinkage: float = 0.0) -> Factor:
    """Damp a Hessian and factorise it as G^T G with G lower triangular.

    Args:
        hessian_II: X^T X up to a scale, shape (in_features, in_features), float32 or float64. Only the lower triangle
            is read.
        damping: Fraction of the mean diagonal to add to the diagonal, > 0. Where the matrix is still not positive
            definite, it is raised tenfold, up to 1, with a warning.
        shrinkage: Fraction of each diagonal entry to add to itself, >= 0: correlations are divided by one plus it
            (a shrinkage towards the diagonal, Schaefer and Strimmer 2005, doi:10.2202/1544-6115.1175). Unlike damping
            it does not depend on the scale of other inputs, of which a few may be far larger.

    Returns:
        The factor, and the damping it took.

    Raises:
        torch.linalg.LinAlgError: If no damping up to 1 makes the matrix positive definite.
    """
    diagonal_I = hessian_II.diagonal()
    mean = float(diagonal_I.mean())
    dead_I = diagonal_I == 0
    tried = damping
    while True:
        # A dead input is coupled to nothing: any positive diagonal does.
        lower_II = _reverse_cholesky(hessian_II, dead_I.to(hessian_II) + mean * tried + shrinkage * diagonal_I)
        if lower_II is not None:
            if tried != damping:
                log.warning("the Hessian was not positive definite: damping raised from %g to %g", damping, tried)
            return Factor(lower_II, dead_I, tried)
        if not 0 < tried * 10 <= MAX_DAMPING:
            raise torch.linalg.LinAlgError(
                f"the Hessian of {hessian_II.shape[0]} inputs is not positive definite with damping up to {tried:g} "
                f"(mean diagonal {mean:g}): look for NaN or inf in the activations, use more calibration tokens, or "
                "set a larger damping"
            )
        tried *= 10


def _reverse_cholesky(hessian_II: Tensor, added_I: Tensor) -> Tensor | None:
    """Factorise H + diag(added) = G^T G from the last columns to the first; None if it is not positive definite.

    The work is done in blocks, so that most of it is matrix products and nothing above the diagonal is touched. For
    each block row b, first what the later rows have already explained is subtracted. Then the diagonal block is
    G_bb^T G_bb, and the rest of the row is G_bb^T G[b, :b].
    """
    lower_II = torch.zeros_like(hessian_II, memory_format=torch.contiguous_format)
    infos = []
    with full_float32(hessian_II.device):
        for start in reversed(range(0, len(hessian_II), BLOCK)):
            stop = min(start + BLOCK, len(hessian_II))
            row_BI = hessian_II[start:stop, :stop]
            row_BI = torch.addmm(row_BI, lower_II[stop:, start:stop].t(), lower_II[stop:, :stop], alpha=-1)
            # Reversing both axes turns the lower triangle into the upper one, which is the lower one of the transpose.
            diagonal_BB = row_BI[:, start:].flip(0, 1)
            diagonal_BB.diagonal().add_(added_I[start:stop].flip(0))
            cholesky_BB, info = torch.linalg.cholesky_ex(diagonal_BB.mT)
            lower_BB = cholesky_BB.mT.flip(0, 1)
            lower_II[start:stop, start:stop] = lower_BB
            # Solved for the transpose, which is how LAPACK wants a row-major matrix.
            rest_IB = torch.linalg.solve_triangular(lower_BB, row_BI[:, :start].mT, upper=False, left=False)
            lower_II[start:stop, :start] = rest_IB.mT
            infos.append(info)
    good = not torch.stack(infos).any() and lower_II.diagonal().isfinite().all()
    return lower_II if good else None
