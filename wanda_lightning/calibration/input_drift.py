"""How far the inputs of a linear in the pruned model are from those in the dense one: what its weights can make up for.

With X the inputs in the dense model, X~ those in the pruned one and W the dense weight, X W^T is what the linear gives
there, and what it is to give here. Only X~^T X~ and X~^T (X - X~) are needed for that (QEP, Arai and Ichikawa 2025,
arXiv:2504.09629). A linear whose output is added to a residual stream r can make up for what r has lost, too.

Shapes: T tokens, O out features, I in features.
"""

import torch
from torch import Tensor

from wanda_lightning.calibration.batches import held_out_batches
from wanda_lightning.solvers.dense_target import Moments, fit_to_dense
from wanda_lightning.solvers.precision import full_float32
from wanda_lightning.statistics import InputHessian


class InputDrift(InputHessian):
    """X~^T X~ over all batches, X~^T (X - X~), and the same sums over the batches that are held out.

    Without a dense input, of experts and where layers are visited in two passes, it is an :class:`InputHessian`.

    Attributes:
        change_II: X~^T (X - X~), shape (in_features, in_features); None as long as no dense input was seen.
        residual_IO: X~^T (r - r~) by the name of the linear that writes to the stream, shape (in_features,
            out_features).
        held_out: The sums over the batches that are held out.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(in_features, device, dtype)
        self.change_II: Tensor | None = None
        self.residual_IO: dict[str, Tensor] = {}
        self.held_out: InputDrift | None = None

    def update_with_dense(
        self, x: Tensor, dense: Tensor, residuals: dict[str, tuple[Tensor, Tensor]], is_held_out: bool
    ) -> None:
        """Add a batch of inputs.

        Args:
            x: Inputs in the pruned model, shape (..., I).
            dense: The same inputs in the dense model.
            residuals: The residual stream, in the dense model and in the pruned one, shape (..., O), by the name of the
                linear that writes to it.
            is_held_out: Whether the batch only tells how well the others serve.
        """
        self._see(x, dense, residuals)
        if self.held_out is None:  # also where this batch is not: all processes have the same sums
            self.held_out = InputDrift(self.in_features, self.total.device, self.total.dtype)
            self.held_out._see(x[:0], dense[:0], {name: (r[:0], s[:0]) for name, (r, s) in residuals.items()})
        if is_held_out:
            self.held_out._see(x, dense, residuals)

    def _see(self, x: Tensor, dense: Tensor, residuals: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.update(x)
        if self.change_II is None:
            self.change_II = torch.zeros_like(self.total)
        self._add_product(self.change_II, x, dense, x)
        for name, (dense_stream, stream) in residuals.items():
            if name not in self.residual_IO:
                self.residual_IO[name] = self.total.new_zeros(self.in_features, stream.shape[-1])
            self._add_product(self.residual_IO[name], x, dense_stream, stream)

    def _add_product(self, total: Tensor, x: Tensor, dense: Tensor, pruned: Tensor) -> None:
        """Add x^T (dense - pruned) to a sum, some tokens at a time."""
        chunks = (tensor.reshape(-1, tensor.shape[-1]).split(self.chunk) for tensor in (x, dense, pruned))
        with full_float32(total.device):
            for x_TI, dense_TO, pruned_TO in zip(*chunks, strict=True):
                total.addmm_(x_TI.to(total.dtype).t(), dense_TO.to(total.dtype) - pruned_TO.to(total.dtype))

    @property
    def sums(self) -> list[Tensor]:
        """All sums, of the held-out batches last."""
        own = [self.total, *([] if self.change_II is None else [self.change_II]), *self.residual_IO.values()]
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
        if self.held_out is None:
            return None
        return fit_to_dense(
            weight_OI, self._moments(name, weight_OI), self.held_out._moments(name, weight_OI), self.factor()
        )

    def _moments(self, name: str, weight_OI: Tensor) -> Moments:
        assert self.change_II is not None
        with full_float32(self.total.device):
            lost_IO = self.change_II @ weight_OI.to(self.change_II).t()
        if name in self.residual_IO:
            lost_IO += self.residual_IO[name]
        lower_II = self.total.tril()
        return Moments(lower_II + lower_II.tril(-1).t(), lost_IO)


def held_out_for_target(batches: int) -> range:
    """Say which of so many calibration batches are held out: every fourth."""
    return held_out_batches(batches, 1 / 4, "dense_target")
