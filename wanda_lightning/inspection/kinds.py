"""The kinds of linears in a model: those that have the same place in every layer, and which share an input.

Shapes: O out features, I in features, B batch, T tokens.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from wanda_lightning.inspection.meta_runs import run_on_meta
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.hooks import before_calls
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.names import kind_of


@dataclass(frozen=True)
class LinearKind:
    """The linears that have the same place in every layer.

    Attributes:
        name: Their name in a layer, ``*`` for the numbers of experts.
        shape: (out_features, in_features).
        count: How many there are in the model.
        tokens: Share of the tokens that each sees: 1, or less for the experts of a mixture.
        input_group: Number of the group that shares one input tensor, within a layer; None where it is not known.
    """

    name: str
    shape: tuple[int, int]
    count: int
    tokens: float
    input_group: int | None


def linear_kinds(model: Any, layers: list[DecoderLayer]) -> list[LinearKind]:
    """Count linears by their name within a layer and their shape.

    Args:
        model: The model, on the meta device.
        layers: Its decoder layers.

    Returns:
        The kinds, in the order in which a layer has them.
    """
    groups = _input_groups(model, layers[0])
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    found: dict[tuple[str, tuple[int, int]], list[PrunableLinear]] = {}
    for layer in layers:
        for linear in layer.linears:
            shape = (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
            found.setdefault((kind_of(linear.name, layer.name), shape), []).append(linear)
    kinds = []
    for (name, shape), linears in found.items():
        experts = len(linears[0].weight) if linears[0].expert is not None else None
        share = chosen / experts if chosen and experts else 1.0
        kinds.append(LinearKind(name, shape, len(linears), share, groups.get(linears[0].name)))
    return kinds


def _input_groups(model: Any, layer: DecoderLayer) -> dict[str, int]:
    """Number the groups of a layer's linears that share an input tensor, as a forward on the meta device shows them."""
    inputs: list[Any] = []
    groups: dict[nn.Module, int] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = [*args, *kwargs.values()][0]
        if not any(seen is x for seen in inputs):
            inputs.append(x)
        groups[module] = next(number for number, seen in enumerate(inputs) if seen is x)

    single = [linear for linear in layer.linears if linear.expert is None]
    with before_calls({linear.module for linear in single}, see):
        run_on_meta(model, 8)
    return {linear.name: groups[linear.module] for linear in single if linear.module in groups}
