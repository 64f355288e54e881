"""Masks that keep the zeros of a pruned model while it is trained.

They are derived from the weights (zero = pruned) and live outside the model: nothing is renamed, wrapped or saved.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightMasks:
    """Boolean masks of the weights that have zeros, one byte a weight.

    Args:
        weights: Parameters by name. Those without zeros need no mask and are left out.

    Attributes:
        masks: For each masked parameter its name, the parameter and the mask (True = kept).
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.masks: list[tuple[str, nn.Parameter, Tensor]] = []
        for name, weight in weights.items():
            mask = weight.detach() != 0
            if not mask.all():
                self.masks.append((name, weight, mask))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Drop the gradients of pruned weights: they count in no norm and enter no momentum."""
        for _, weight, mask in self.masks:
            if weight.grad is not None:
                weight.grad.mul_(mask)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set pruned weights to zero again, whatever an optimizer's momentum or weight decay made of them."""
        for _, weight, mask in self.masks:
            weight.mul_(mask)

    @torch.no_grad()
    def check(self) -> None:
        """Make sure that every pruned weight is zero.

        Raises:
            RuntimeError: If one is not, with the names of the linears.
        """
        if dense := [name for name, weight, mask in self.masks if (weight.masked_fill(mask, 0) != 0).any()]:
            raise RuntimeError(
                f"pruned weights of {len(dense)} linears are no longer zero ({', '.join(dense[:3])}, ...): "
                "something changed them outside the optimizers of the Trainer"
            )
