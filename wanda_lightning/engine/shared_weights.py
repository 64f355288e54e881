"""One matrix under several names: it is pruned once, and in one way only.

Layers of some models share matrices, and users tie more of them. What counts is the memory, not the name.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.offload import is_offloaded
from wanda_lightning.sparsity import Pattern


class Repeat(NamedTuple):
    """A linear whose matrix another linear has.

    Attributes:
        name: The linear.
        layer: Its decoder layer.
        first: The linear that has the matrix too, and is pruned.
    """

    name: str
    layer: str
    first: str


def repeats_in(decoder: Sequence[DecoderLayer], uncalled: Collection[str] = ()) -> list[Repeat]:
    """Find the linears whose matrix another linear has: the first of those that the model calls.

    Args:
        decoder: Layers with their linears.
        uncalled: Names of linears that the model does not call.

    Returns:
        All but that one, of every matrix.
    """
    linears = [(layer.name, linear) for layer in decoder for linear in layer.linears if linear.is_stored]
    first: dict[tuple[int, int | None, int | None], str] = {}
    for _, linear in linears:
        if first.setdefault(_matrix(linear), linear.name) in uncalled and linear.name not in uncalled:
            first[_matrix(linear)] = linear.name
    pruned = [(layer, linear.name, first[_matrix(linear)]) for layer, linear in linears]
    return [Repeat(name, layer, other) for layer, name, other in pruned if name != other]


def without_repeats(
    model: nn.Module,
    decoder: Sequence[DecoderLayer],
    patterns: Mapping[str, Pattern],
    uncalled: Collection[str] = (),
) -> tuple[list[DecoderLayer], list[Repeat]]:
    """Leave out linears whose matrix another linear has.

    Args:
        model: The model.
        decoder: Its layers, with the linears that are to be pruned.
        patterns: What each is to be pruned to, by name.
        uncalled: Names of linears that the model does not call.

    Returns:
        The layers without repeats; and the repeats.

    Raises:
        ValueError: If a matrix is to be pruned under one name and not under another, or to different patterns; or if
            there are repeats in a model that is not in memory.
    """
    _refuse_left_dense(model, [linear for layer in decoder for linear in layer.linears if linear.is_stored])
    repeats = repeats_in(decoder, uncalled)
    if repeats and is_offloaded(model):
        raise ValueError(
            f"{repeats[0].first} and {repeats[0].name} share one weight, of which a model that is not in memory has "
            "copies: load it into memory as a whole"
        )
    for name, _, first in repeats:
        if patterns[first] != patterns[name]:
            raise ValueError(
                f"{first} and {name} share one weight, which cannot be pruned to both {patterns[first]!r} and "
                f"{patterns[name]!r}: name both in the allocation, or neither"
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


def _matrix(linear: PrunableLinear) -> tuple[int, int | None, int | None]:
    return _place(linear.weight), linear.expert, linear.projection


def _place(weight: nn.Parameter) -> int:
    """Tell weights apart by where they are in memory; offloaded ones are nowhere."""
    return weight.data_ptr() or id(weight)
