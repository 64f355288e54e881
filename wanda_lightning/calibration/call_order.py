"""In which order a model calls the layers of a stack: mostly each once, one after another."""

from collections.abc import Sequence

import torch
from torch import Tensor


class CallOrder:
    """Sees that a model calls layers in the order in which it is known to.

    Args:
        calls: The places of the layers in their list, from 0, in the order of the calls.
    """

    def __init__(self, calls: Sequence[int]) -> None:
        self._calls, self._next = calls, 0

    def called(self, index: int) -> None:
        """Note the call of a layer.

        Args:
            index: Its place in the list.

        Raises:
            ValueError: If another one would be next.
        """
        due = self._calls[self._next] if self._next < len(self._calls) else "none"
        if index != due:
            raise ValueError(
                f"the model calls decoder layer {index} where layer {due} would be next: only models that call their "
                "layers in one order, the same for all batches, can be pruned layer by layer; and where layers are on "
                "disk, only those that call each of them once"
            )
        self._next += 1

    def ended(self) -> None:
        """Note that the model is behind its layers.

        Raises:
            ValueError: If calls are missing.
        """
        if self._next < len(self._calls):
            raise ValueError(
                f"the model makes {self._next} of {len(self._calls)} calls of its decoder layers: only models that "
                "call their layers in one order, the same for all batches, can be pruned layer by layer"
            )


def is_passed_on(given: Tensor, taken: Tensor) -> bool:
    """Whether what enters a layer is what another gave."""
    return taken is given or (taken.dtype == given.dtype and torch.equal(taken.to(given.device), given))
