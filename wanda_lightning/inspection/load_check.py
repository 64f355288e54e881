"""Whether transformers would load a checkpoint, told from the names and shapes of its tensors."""

import logging
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wanda_lightning.checkpoints.quiet import quiet, without_progress_bars


@dataclass(frozen=True)
class LoadCheck:
    """What transformers would do with stored weights.

    Attributes:
        missing: Weights of the model that are not stored; it would fill them with random numbers.
        mismatched: Weights whose stored shape is not that of the config, and both shapes.
        unused: Stored weights that the model does not have; it would ignore them.
        fits_together: Whether what the model fuses, such as the matrices of experts, is there and of one shape.
    """

    missing: list[str]
    mismatched: list[str]
    unused: list[str]
    fits_together: bool = True

    @property
    def loads_whole(self) -> bool:
        """Whether every weight of the model would be what is stored."""
        return self.fits_together and not self.missing and not self.mismatched


def load_check(model: nn.Module, shapes: dict[str, list[int]]) -> LoadCheck:
    """Let transformers load weights that take no memory: it knows what goes where.

    Args:
        model: The model that the config describes, on the meta device.
        shapes: Shapes of the stored weights by name.

    Returns:
        What it says of them.
    """
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    settings = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    family: Any = type(model)
    try:
        with quiet("transformers", logging.CRITICAL), without_progress_bars():
            _, found = family.from_pretrained(None, config=deepcopy(model.config), state_dict=weights, **settings)
    except RuntimeError:  # says no names
        return LoadCheck([], [], [], fits_together=False)
    other = [f"{name} {tuple(stored)} for {tuple(wanted)}" for name, stored, wanted in sorted(found["mismatched_keys"])]
    return LoadCheck(sorted(found["missing_keys"]), other, sorted(found["unexpected_keys"]))
