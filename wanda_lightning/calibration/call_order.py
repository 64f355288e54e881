"""How a model has to call the layers of a stack: each once, one after another."""

import torch
from torch import Tensor


class CallOrder:
    """Sees that a model calls each layer once, in order.

    Args:
        layers: How many there are.
    """

    def __init__(self, layers: int) -> None:
        self._layers, self._next = layers, 0

    def called(self, index: int) -> None:
        """Note the call of a layer.

        Args:
            index: Its place among the layers, from 0.

        Raises:
            ValueError: If another one would be next.
        """
        if index != self._next:
            raise ValueError(
                f"the model calls decoder layer {index} where layer {self._next} of {self._layers} would be next: "
                "only models that call each of their layers once and in order can be pruned layer by layer"
            )
        self._next += 1

    def ended(self) -> None:
        """Note that the model is behind its layers.

        Raises:
            ValueError: If it has not called all of them.
        """
        if self._next < self._layers:
            raise ValueError(
                f"the model calls {self._next} of its {self._layers} decoder layers: name their list with layers"
            )


def is_passed_on(given: Tensor, taken: Tensor) -> bool:
    """Whether what enters a layer is what another gave."""
    return taken is given or (taken.dtype == given.dtype and torch.equal(taken.to(given.device), given))
