"""What enters the layers of a stack, one layer after another. Shapes: B batch, T tokens, D hidden size."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wanda_lightning.calibration.calls import Arguments, hidden_states_of
from wanda_lightning.calibration.hidden_states import HiddenStates
from wanda_lightning.calibration.real_tokens import RealTokens
from wanda_lightning.model.decoder import DecoderLayer


class Stream(ABC):
    """All batches before a layer: the first of a stack, until it is told to go on.

    Attributes:
        hidden_BTD: The hidden states that enter the layer. What the layer gives takes their place.
        arguments: What else the model passes to the layer, a batch.
        real: Which tokens are real, a batch.
    """

    hidden_BTD: HiddenStates
    arguments: list[Arguments]
    real: list[RealTokens]

    def call(self, layer: DecoderLayer, batch: int, hidden_BTD: Tensor) -> Any:
        """Call the layer as the model does.

        Args:
            layer: The layer.
            batch: Number of the batch.
            hidden_BTD: The hidden states of the batch.

        Returns:
            What the layer gives.
        """
        return self.arguments[batch].call(layer.module, hidden_BTD)

    def take(self, batch: int, out: Any) -> Tensor:
        """Take what the layer gives for a batch as what the model is to go on with.

        Args:
            batch: Number of the batch.
            out: Hidden states, or a tuple or list that starts with them. A later call counts in place of this one.

        Returns:
            The hidden states (B, T, D), which are still to be put into ``hidden_BTD``.
        """
        return hidden_states_of(out)

    @abstractmethod
    def go_on(self) -> None:
        """Go on to the next layer of the stack; ``hidden_BTD`` holds what the last one gave."""

    @abstractmethod
    def twin(self) -> "Stream":
        """Return another stream before the same layer, of which this one learns nothing."""

    def close(self) -> None:
        """Let go of what waits."""


def check_tokens(real: Sequence[RealTokens]) -> None:
    """Refuse a calibration set of padding.

    Args:
        real: Which of its tokens are real, a batch.

    Raises:
        ValueError: If there is nothing else in it.
    """
    if not any(tokens.mask_BT is None or bool(tokens.mask_BT.any()) for tokens in real):
        raise ValueError("the calibration set holds padding only: attention_mask is 0 everywhere")
