"""What the decoder layers would give if nothing were pruned: a second stream of hidden states beside that of the walk.

Shapes: B batch, T tokens, D hidden size.
"""

from torch import Tensor

from wanda_lightning.calibration.dense_inputs import DenseInputs
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.calibration.stream import Stream
from wanda_lightning.model.decoder import DecoderLayer


class DenseStream:
    """The hidden states of the dense model. Each layer has to be passed before it is pruned.

    Args:
        stream: What enters the layers, for this stream alone.
        keep_inputs: Where what enters the linears of a layer waits, too, if that is wanted.

    Attributes:
        hidden_BTD: What the last layer that was passed gives, one tensor a batch.
    """

    def __init__(self, stream: Stream, keep_inputs: Place | None = None) -> None:
        self._stream, self._keep_inputs, self._is_behind = stream, keep_inputs, False
        self.hidden_BTD = stream.hidden_BTD

    def advance(self, layer: DecoderLayer) -> DenseInputs | None:
        """Pass the next layer, which is dense still; return what entered its linears, if that is wanted."""
        seen = DenseInputs(layer, self._keep_inputs) if self._keep_inputs else None
        if self._is_behind:
            self._stream.go_on()
        self._is_behind = True
        for batch, hidden_BTD in enumerate(self.hidden_BTD):

            def run(batch: int = batch, hidden_BTD: Tensor = hidden_BTD) -> Tensor:
                return self._stream.take(batch, self._stream.call(layer, batch, hidden_BTD))

            self.hidden_BTD[batch] = seen.record(hidden_BTD, run) if seen else run()
        return seen

    def close(self) -> None:
        """Let go of what waits."""
        self._stream.close()
