"""What linears see in the pruned model beside what they see in the dense one, where that is known.

Shapes: B batch, T tokens, I in features.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from wanda_lightning.calibration.calibrated_layer import CalibratedLayer
from wanda_lightning.calibration.collector import real_inputs
from wanda_lightning.calibration.input_drift import InputDrift, held_out_for_target
from wanda_lightning.model.hooks import before_calls
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.precision import full_float32
from wanda_lightning.statistics import InputStatistic


class BothStreams:
    """Counts what enters the linears of a layer while it runs on the hidden states of the pruned model.

    Args:
        inputs: The layer and what enters it, also in the dense model if that is wanted.
    """

    def __init__(self, inputs: CalibratedLayer) -> None:
        self._inputs, self._dense = inputs, inputs.dense_inputs
        self._readers = (self._dense.readers if self._dense else None) or {}
        self._held_out = held_out_for_target(len(inputs.hidden_BTD)) if self._dense else range(0)
        self._streams: dict[tuple[nn.Module, int], Tensor] = {}  # by module that reads the residual stream, and batch

    def watched(self, batch: Callable[[], int]) -> AbstractContextManager[None]:
        """Remember, for a while, the residual stream as it is before a linear adds to it.

        Args:
            batch: Tells which batch is running.

        Returns:
            What sets the while.
        """

        def reads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._streams[module, batch()] = [*args, *kwargs.values()][0]

        return before_calls([reader for reader in self._readers.values() if reader is not None], reads)

    def count(self, statistic: InputStatistic, linear: PrunableLinear, x: Tensor, batch: int) -> None:
        """Add the real tokens of a batch to the statistic of a linear's inputs.

        Args:
            statistic: The statistic.
            linear: The linear.
            x: What enters its module, shape (B, T, I) or flattened.
            batch: Number of the batch.
        """
        mask_BT = self._inputs.real[batch].of(x)

        def real(tensor: Tensor) -> Tensor:
            return real_inputs(tensor, mask_BT, linear)

        def gap(dense: Tensor, pruned: Tensor) -> Tensor:
            dense_TF, pruned_TF = (real(each).flatten(0, -2).to(statistic.total) for each in (dense, pruned))
            return dense_TF - pruned_TF

        dense = self._dense.of(linear.module, batch) if self._dense else None
        if not isinstance(statistic, InputDrift) or self._dense is None or dense is None:
            statistic.update(real(x))
            return
        lost, writer = gap(dense, x), None
        if linear.module in self._readers:
            reader, writer = self._readers[linear.module], linear.name
            dense_stream = self._dense.of(reader, batch)
            assert dense_stream is not None
            stream = self._inputs.hidden_BTD[batch] if reader is None else self._streams.pop((reader, batch))
            with full_float32(lost.device):
                lost = gap(dense_stream, stream).addmm_(lost, linear.weight_OI.to(lost).t())
        statistic.update_with_dense(real(x).flatten(0, -2), lost, writer, batch in self._held_out)
