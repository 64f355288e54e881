"""Masks that keep the zeros of a pruned model while it is trained.

They are derived from the weights (zero = pruned) and live outside the model: nothing is renamed, wrapped or saved.
Zeros that are there by design, such as a new block's last matrix, are not taken for pruned.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanda_lightning.model.decoder import every_linear
from wanda_lightning.model.language_model import find_model
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.sparsity import Pattern, sparsity_of, zero_where_pruned

log = logging.getLogger(__name__)

BY_CHANCE = 0.02
"""Half precision makes zeros while a model is trained, and some methods prune a little more than they were asked to."""


class WeightMasks:
    """Boolean masks of the weights that have zeros, one byte a weight.

    If a weight is sharded (DTensor), each process masks its own part.

    Args:
        weights: Parameters by name. Those without zeros need no mask and are left out.
        spared: Booleans of the shapes of some parameters: True where a zero was not pruned and may be trained.

    Attributes:
        masks: For each masked parameter its name, the parameter and the mask (True = kept).
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], spared: Mapping[nn.Parameter, Tensor] | None = None
    ) -> None:
        self.masks: list[tuple[str, nn.Parameter, Tensor]] = []
        for name, weight in weights.items():
            mask = _local(weight) != 0
            if spared and weight in spared:
                mask |= _local(spared[weight])
            if not mask.all():
                self.masks.append((name, weight, mask))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Drop the gradients of pruned weights: they count in no norm and enter no momentum."""
        for _, weight, mask in self.masks:
            if weight.grad is not None:
                zero_where_pruned(_local(weight.grad), mask)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set pruned weights to zero again, whatever an optimizer's momentum or weight decay made of them."""
        for _, weight, mask in self.masks:
            if weight.requires_grad:  # no optimizer has touched the others, such as those below adapters
                zero_where_pruned(_local(weight), mask)

    @torch.no_grad()
    def mask_copies(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """Set to zero, in copies of the weights such as running averages, what is pruned in the weights.

        Args:
            copies: Copies by the parameter they are of; parameters may be missing.
        """
        for _, weight, mask in self.masks:
            if weight in copies:
                copy = _local(copies[weight])
                zero_where_pruned(copy, mask.to(copy.device))

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


def masks_of(linears: Sequence[PrunableLinear], pruned_to: Mapping[str, Pattern] | None = None) -> WeightMasks:
    """Mask what was pruned of some matrices, as they are now.

    Args:
        linears: Matrices of a model.
        pruned_to: By name, what they were pruned to, if that is known; zeros beyond it are trained.

    Returns:
        The masks.
    """
    spared, whose = zeros_by_design(linears, pruned_to)
    if whose:
        log.warning("zeros that are there by design, not by pruning, are trained: those of %s", ", ".join(whose))
    return WeightMasks({linear.parameter_name: linear.weight for linear in linears}, spared)


def masks_of_decoder(model: nn.Module, layers: str | Sequence[str] | None = None) -> WeightMasks:
    """Mask the zeros that the linears of a decoder have now.

    Args:
        model: A module that holds a causal language model of transformers.
        layers: Name of the list of decoder layers, where the rule for finding it fails.

    Returns:
        The masks; a warning says if there are none.
    """
    masks = masks_of(every_linear(find_model(model), layers))
    if not masks.masks:
        log.warning("the model has no zeros to keep: it was not pruned, and is trained as a dense one")
    return masks


@torch.no_grad()
def zeros_by_design(
    linears: Iterable[PrunableLinear], pruned_to: Mapping[str, Pattern] | None = None
) -> tuple[dict[nn.Parameter, Tensor], list[str]]:
    """Find zeros that nobody pruned.

    Where it is known what the matrices were pruned to, they are the zeros beyond that; which of a row's zeros were
    pruned goes by position, as in the methods, whose scores are the same for all zeros. Where it is not known, they are
    the matrices that are zero as a whole.

    Args:
        linears: Matrices of a model.
        pruned_to: By name, what they were pruned to, if it is known.

    Returns:
        Booleans of the shapes of parameters, True where such a zero is; and the names of the matrices.
    """
    spared: dict[nn.Parameter, Tensor] = {}
    names = []
    for linear in linears:
        weight_OI = linear.weight_OI
        if weight_OI.is_meta or (hasattr(weight_OI, "placements") and linear.expert is not None):
            continue
        if pruned_to is None:
            zero_OI = torch.ones_like(weight_OI, dtype=torch.bool) if _is_zero(weight_OI) else None
        else:
            zero_OI = _beyond(weight_OI, pruned_to[linear.name])
        if zero_OI is not None:
            names.append(linear.name)
            whole = spared.setdefault(linear.weight, torch.zeros_like(linear.weight, dtype=torch.bool))
            linear.view(whole).copy_(zero_OI)
    return spared, names


def _beyond(weight_OI: Tensor, pattern: Pattern) -> Tensor | None:
    """Mark the zeros of a matrix that its pattern does not ask for, if there are more than chance and methods make."""
    if sparsity_of(weight_OI) <= pattern.sparsity + BY_CHANCE:
        return None
    zero_OI = (weight_OI == 0) & pattern.mask(weight_OI.float().abs())
    return zero_OI if zero_OI.any() else None


def _is_zero(weight_OI: Tensor) -> bool:
    """Whether a matrix, which may be sharded over processes, is zero as a whole."""
    largest = torch.linalg.vector_norm(weight_OI, ord=float("inf"))
    return not bool(cast(Any, largest).full_tensor() if hasattr(largest, "full_tensor") else largest)


def _local(tensor: Tensor) -> Tensor:
    """Return the values that this process holds, outside autograd; writing to them changes the tensor."""
    values = tensor.detach()
    return cast(Any, values).to_local() if hasattr(values, "to_local") else values
