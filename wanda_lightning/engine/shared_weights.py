"""One matrix under several names: it is pruned once, and in one way only.

Layers of some models share matrices, and users tie more of them. What counts is the memory, not the name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.sparsity import Pattern


class Repeat(NamedTuple):
    """A linear whose matrix an earlier linear has.

    Attributes:
        name: The linear.
        layer: Its decoder layer.
        first: The linear that has the matrix too, and was pruned.
    """

    name: str
    layer: str
    first: str


def without_repeats(
    model: nn.Module, decoder: Sequence[DecoderLayer], patterns: Mapping[str, Pattern]
) -> tuple[list[DecoderLayer], list[Repeat]]:
    """Leave out linears whose matrix an earlier linear has.

    Args:
        model: The model.
        decoder: Its layers, with the linears that are to be pruned.
        patterns: What each is to be pruned to, by name.

    Returns:
        The layers without repeats; and the repeats.

    Raises:
        ValueError: If a matrix is to be pruned under one name and not under another, or to different patterns.
    """
    linears = [(layer.name, linear) for layer in decoder for linear in layer.linears if linear.is_stored]
    _refuse_left_dense(model, [linear for _, linear in linears])
    first: dict[tuple[int, int | None, int | None], PrunableLinear] = {}
    repeats: list[Repeat] = []
    for layer, linear in linears:
        earlier = first.setdefault((_place(linear.weight), linear.expert, linear.projection), linear)
        if earlier is linear:
            continue
        repeats.append(Repeat(linear.name, layer, earlier.name))
        if patterns[earlier.name] != patterns[linear.name]:
            raise ValueError(
                f"{earlier.name} and {linear.name} share one weight, which cannot be pruned to both "
                f"{patterns[earlier.name]!r} and {patterns[linear.name]!r}: name both in the allocation, or neither"
            )
    again = {repeat.name for repeat in repeats}
    return [replace(layer, linears=[x for x in layer.linears if x.name not in again]) for layer in decoder], repeats


def _refuse_left_dense(model: nn.Module, pruned: Sequence[PrunableLinear]) -> None:
    """Refuse a matrix that the model also has where it is to stay dense, such as its embeddings."""
    names = {_place(linear.weight): linear.name for linear in pruned}
    parameters = {linear.parameter_name for linear in pruned}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            name = f"{prefix.replace('._orig_mod', '')}.{attribute}"
            if parameter is not None and name not in parameters and _place(parameter) in names:
                raise ValueError(
                    f"{names[_place(parameter)]} shares its weight with {name}, which is to stay dense: "
                    "leave both out with ignore, or prune both"
                )


def _place(weight: nn.Parameter) -> int:
    """Tell weights apart by where they are in memory; offloaded ones are nowhere."""
    return weight.data_ptr() or id(weight)
