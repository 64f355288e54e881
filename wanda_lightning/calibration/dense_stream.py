"""What the decoder layers would give if nothing were pruned: a second stream of hidden states beside that of the walk.

Shapes: B batch, T tokens, D hidden size.
"""

import copy
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from wanda_lightning.calibration.calls import Arguments, hidden_states_of
from wanda_lightning.calibration.dense_inputs import DenseInputs
from wanda_lightning.calibration.hidden_states import HiddenStates
from wanda_lightning.model.decoder import DecoderLayer


class DenseStream:
    """The hidden states of the dense model. Each layer has to be passed before it is pruned.

    Args:
        hidden_BTD: The hidden states that enter the first layer; they are kept a second time, in the same place.
        arguments: What else the model passes to its layers, ``arguments[layer][batch]``.

    Attributes:
        hidden_BTD: What the last layer that was passed gives, one tensor a batch.
    """

    def __init__(self, hidden_BTD: HiddenStates, arguments: list[list[Arguments]]) -> None:
        self.hidden_BTD = HiddenStates(hidden_BTD.place)
        for batch_BTD in hidden_BTD:
            self.hidden_BTD.append(batch_BTD)
        copies: dict[int, MutableMapping[Any, Any]] = {}
        self._arguments = [[_with_own_dicts(call, copies) for call in calls] for calls in arguments]

    def advance(self, number: int, layer: DecoderLayer, record: DenseInputs | None = None) -> None:
        """Pass a layer, which is dense still.

        Args:
            number: Its place among the layers, from 0.
            layer: The layer.
            record: Keeps what enters its linears, where that is wanted.
        """
        for batch, arguments in enumerate(self._arguments[number]):
            hidden_BTD = self.hidden_BTD[batch]

            def run(hidden_BTD: Tensor = hidden_BTD, arguments: Arguments = arguments) -> Tensor:
                return hidden_states_of(arguments.call(layer.module, hidden_BTD))

            self.hidden_BTD[batch] = record.record(hidden_BTD, run) if record else run()
        self._arguments[number] = []


def _with_own_dicts(call: Arguments, copies: dict[int, MutableMapping[Any, Any]]) -> Arguments:
    """Copy the mappings that early layers write to and late ones read: the two streams must not meet there."""

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), copy.copy(value)) if isinstance(value, MutableMapping) else value

    return call._replace(args=tuple(map(own, call.args)), kwargs={name: own(x) for name, x in call.kwargs.items()})
