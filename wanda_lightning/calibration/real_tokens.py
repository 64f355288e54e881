"""Which tokens of a batch are no padding: those of the hidden states, and those that a layer attends to besides.

Shapes: B batch, T tokens, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wanda_lightning.calibration.call_order import is_passed_on

OF_DECODERS = ("decoder_", "tgt_")
"""How the names of masks begin that are of what an encoder-decoder writes."""

CONTEXT = ("encoder_hidden", "memory", "context", "cross")
"""Words in the names of arguments that hold what cross-attention looks at."""


@dataclass(frozen=True)
class RealTokens:
    """The real tokens of a batch in one stack of layers.

    Attributes:
        mask_BT: Which of the hidden states are of real tokens; None where all are.
        elsewhere: Tensors that a layer gets besides, such as an encoder's output, each with the mask of its tokens.
    """

    mask_BT: Tensor | None = None
    elsewhere: tuple[tuple[Tensor, Tensor | None], ...] = ()

    def of(self, x: Tensor) -> Tensor | None:
        """Return the mask of the tokens in what enters a linear, which on another GPU is a copy."""
        return next((mask for tensor, mask in self.elsewhere if is_passed_on(x, tensor)), self.mask_BT)


def real_tokens(masks: Mapping[str, Tensor], hidden: Tensor, arguments: Mapping[str, Any]) -> RealTokens:
    """Find the masks of what enters a layer among those of the batch, by name and shape.

    Args:
        masks: The batch's masks by name, booleans of two dimensions, True = real.
        hidden: The hidden states that enter the layer; their first two dimensions are batch and tokens, or the reverse.
        arguments: What else the layer is given, by the names of its parameters.

    Returns:
        What is known of the tokens. An encoder's mask is not taken for that of a decoder which looks at the encoder.
    """
    context = [x for name, x in arguments.items() if isinstance(x, Tensor) and any(word in name for word in CONTEXT)]
    written = {name: mask for name, mask in masks.items() if name.startswith(OF_DECODERS)}
    read = {name: mask for name, mask in masks.items() if name not in written}
    own = _fitting(written if context else read, hidden)
    return RealTokens(own, tuple((x, _fitting(read, x)) for x in context if x.dim() >= 3))


def _fitting(masks: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
    for mask in masks.values():
        for laid_out in (mask, mask.t()):
            if x.dim() >= 3 and laid_out.shape == x.shape[:2]:
                return None if bool(mask.all()) else laid_out
    return None
