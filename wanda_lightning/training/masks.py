"""Masks that keep the zeros of a pruned model while it is trained.

They are derived from the weights (zero = pruned) and live outside the model: nothing is renamed, wrapped or saved.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


class WeightMasks:
    """Boolean masks of the weights that have zeros, one byte a weight.

    If a weight is sharded (DTensor), each process masks its own part.

    Args:
        weights: Parameters by name. Those without zeros need no mask and are left out.

    Attributes:
        masks: For each masked parameter its name, the parameter and the mask (True = kept).
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.masks: list[tuple[str, nn.Parameter, Tensor]] = []
        for name, weight in weights.items():
            mask = _local(weight) != 0
            if not mask.all():
                self.masks.append((name, weight, mask))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Drop the gradients of pruned weights: they count in no norm and enter no momentum."""
        for _, weight, mask in self.masks:
            if weight.grad is not None:
                _keep(_local(weight.grad), mask)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set pruned weights to zero again, whatever an optimizer's momentum or weight decay made of them."""
        for _, weight, mask in self.masks:
            if weight.requires_grad:  # no optimizer has touched the others, such as those below adapters
                _keep(_local(weight), mask)

    @torch.no_grad()
    def mask_copies(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """Set to zero, in copies of the weights such as running averages, what is pruned in the weights.

        Args:
            copies: Copies by the parameter they are of; parameters may be missing.
        """
        for _, weight, mask in self.masks:
            if weight in copies:
                copy = _local(copies[weight])
                _keep(copy, mask.to(copy.device))

    @torch.no_grad()
    def check(self) -> None:
        """Make sure that every pruned weight is zero.

        Raises:
            RuntimeError: If one is not, with the names of the linears.
        """
        dense = []
        for name, weight, mask in self.masks:
            values = _local(weight)
            if bool(((values != 0) & ~mask.to(values.device)).any()):
                dense.append(name)
        if dense:
            raise RuntimeError(
                f"pruned weights of {len(dense)} linears are no longer zero ({', '.join(dense[:3])}"
                f"{', ...' if len(dense) > 3 else ''}): something changed them outside the optimizers of the Trainer. "
                "If it was an adapter's merge: merge under the masks, as LoraSettings(merge='masked') does, or save "
                "the adapter alone"
            )


def _local(tensor: Tensor) -> Tensor:
    """Return the values that this process holds, outside autograd; writing to them changes the tensor."""
    values = tensor.detach()
    return cast(Any, values).to_local() if hasattr(values, "to_local") else values


def _keep(values: Tensor, mask: Tensor) -> None:
    values.mul_(mask.view(torch.uint8))  # by way of bytes: three times as fast on a CPU as by booleans
