"""How far the inputs of a linear in the pruned model are from those in the dense one: what its weights can make up for.

With X the inputs in the dense model, X~ those in the pruned one and W the dense weight, X W^T is what the linear gives
there, and what it is to give here. Only X~^T X~ and X~^T (X - X~) are needed for that (QEP, Arai and Ichikawa 2025,
arXiv:2504.09629). A linear whose output is added to a residual stream r can make up for what r has lost, too: of such
a one the sum is taken over outputs, which are often fewer than inputs.

Shapes: T tokens, O out features, I in features.
"""

import torch
from torch import Tensor

from wanda_lightning.calibration.batches import held_out_batches
from wanda_lightning.precision import full_float32
from wanda_lightning.solvers.dense_target import Moments, fit_to_dense
from wanda_lightning.solvers.factor import Factor, factorize
from wanda_lightning.statistics import InputHessian, InputStatistic

SHRINKAGE = 0.3
"""Of the inputs' correlations, where weights are moved: with less of it they fit few tokens too well."""


class InputDrift(InputHessian):
    """X~^T X~ over all batches, X~^T (X - X~), and the same sums over the batches that are held out.

    Without a dense input, of experts and where layers are visited in two passes, it is an :class:`InputHessian`.

    Attributes:
        change_II: X~^T (X - X~), shape (in_features, in_features); None as long as no such inputs were seen.
        lost_IO: X~^T (X W^T + r - X~ W^T - r~) by the name of the linear that writes to the stream, shape (in_features,
            out_features).
        held_out: The sums over the batches that are held out.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(in_features, device, dtype)
        self.change_II: Tensor | None = None
        self.lost_IO: dict[str, Tensor] = {}
        self.held_out: InputDrift | None = None
        self._train_factor: Factor | None = None

    def update_with_dense(self, x: Tensor, gap: Tensor, writer: str | None, is_held_out: bool) -> None:
        """Add a batch of inputs.

        Args:
            x: Inputs in the pruned model, shape (T, I).
            gap: What they lack: inputs in the dense model less those, shape (T, I); or, of a linear that writes to the
                stream, output and stream in the dense model less those that its dense weight gives here, shape (T, O).
            writer: The name of that linear; None where the gap is of inputs.
            is_held_out: Whether the batch only tells how well the others serve.
        """
        if self.held_out is None:  # also where this batch is not: all processes have the same sums
            self.held_out = self._empty()
            self.held_out._see(x[:0], gap[:0], writer)
        if is_held_out:
            batch = self._empty()
            batch._see(x, gap, writer)
            self.held_out.merge(batch)
            self.merge(batch)
        else:
            self._see(x, gap, writer)

    def _empty(self) -> "InputDrift":
        return InputDrift(self.in_features, self.total.device, self.total.dtype)

    def merge(self, other: InputStatistic) -> None:
        """Add what another one has seen; which of it was held out there is not looked at."""
        super().merge(other)
        assert isinstance(other, InputDrift)
        if other.change_II is not None:
            self._change().add_(other.change_II)
        for name, lost_IO in other.lost_IO.items():
            self._lost(name, lost_IO.shape[1]).add_(lost_IO)

    def _see(self, x: Tensor, gap: Tensor, writer: str | None) -> None:
        self.update(x)
        total = self._change() if writer is None else self._lost(writer, gap.shape[1])
        with full_float32(total.device):
            for x_TI, gap_TO in zip(x.split(self.chunk), gap.split(self.chunk), strict=True):
                total.addmm_(x_TI.to(total.dtype).t(), gap_TO.to(total.dtype))

    def _change(self) -> Tensor:
        if self.change_II is None:
            self.change_II = torch.zeros_like(self.total)
        return self.change_II

    def _lost(self, writer: str, out_features: int) -> Tensor:
        if writer not in self.lost_IO:
            self.lost_IO[writer] = self.total.new_zeros(self.in_features, out_features)
        return self.lost_IO[writer]

    @property
    def sums(self) -> list[Tensor]:
        """All sums, of the held-out batches last."""
        own = [self.total, *([] if self.change_II is None else [self.change_II]), *self.lost_IO.values()]
        return own + (self.held_out.sums if self.held_out is not None else [])

    def target(self, name: str, weight_OI: Tensor) -> tuple[Tensor, float] | None:
        """Return the weight that is to be pruned in place of a linear's own.

        Args:
            name: Of the linear.
            weight_OI: Its dense weight, shape (out_features, in_features).

        Returns:
            The weight, of the sums' dtype, and how much of the way was gone to it, in [0, 1]; None where nothing is
            known of the dense model's inputs.

        Raises:
            torch.linalg.LinAlgError: If X~^T X~ cannot be factorised.
        """
        whole = self._moments(name, weight_OI)
        if whole is None or self.held_out is None:
            return None
        held_out = self.held_out._moments(name, weight_OI)
        assert held_out is not None
        factor = self.factor(shrinkage=SHRINKAGE)
        if self._train_factor is None:
            some_II = whole.hessian_II - held_out.hessian_II
            self._train_factor = factorize(some_II, factor.damping, SHRINKAGE)
        return fit_to_dense(weight_OI, whole, held_out, factor, self._train_factor)

    def _moments(self, name: str, weight_OI: Tensor) -> Moments | None:
        lost_IO = self.lost_IO.get(name)
        if lost_IO is None and self.change_II is not None:
            with full_float32(self.total.device):
                lost_IO = self.change_II @ weight_OI.to(self.change_II).t()
        lower_II = self.total.tril()
        return None if lost_IO is None else Moments(lower_II + lower_II.tril(-1).t(), lost_IO)


def held_out_for_target(batches: int) -> range:
    """Say which of so many calibration batches are held out: every fourth."""
    return held_out_batches(batches, 1 / 4, "dense_target")
