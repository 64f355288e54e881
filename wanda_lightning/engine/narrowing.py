"""What it takes to make a model's MLPs narrower: found and checked before anything changes, then done at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wanda_lightning.engine.checks import check_finite
from wanda_lightning.engine.reshaping import check_can_change_shape, described
from wanda_lightning.model.configuration import (
    Path,
    find_numbers,
    set_number,
    shapes_of,
    skeleton,
    take_over,
)
from wanda_lightning.model.coupling import find_neurons
from wanda_lightning.model.decoder import DecoderLayer, decoder_layers
from wanda_lightning.model.heads import Heads, find_heads
from wanda_lightning.model.linears import own_modules
from wanda_lightning.model.neurons import Neurons, keep_neurons

MULTIPLES = (256, 64, 16, 8, 1)
"""What the number of neurons is rounded to: the first of which the width is at least sixteen times as much."""


def kept_of(width: int, keep: float, multiple: int | None = None) -> int:
    """Say how many neurons stay.

    Args:
        width: How many there are.
        keep: The fraction that is to stay, in (0, 1].
        multiple: What the number is rounded to. Default: 256 where that is at most a sixteenth of the width, else 64,
            16, 8 or 1.

    Returns:
        The number.

    Raises:
        ValueError: If none stays.
    """
    multiple = multiple or next(each for each in MULTIPLES if width >= 16 * each or each == 1)
    kept = width if keep == 1 else min(width, round(keep * width / multiple) * multiple)
    if kept < 1:
        raise ValueError(
            f"keep={keep} of {width} neurons, rounded to a multiple of {multiple}, leaves none: keep more, or give a "
            "smaller multiple"
        )
    return kept


def groups_of(groups: int, keep: float) -> int:
    """Say how many key/value groups of attention stay.

    Args:
        groups: How many there are.
        keep: The fraction that is to stay, in (0, 1].

    Returns:
        The nearest whole number.

    Raises:
        ValueError: If none stays.
    """
    if (kept := round(keep * groups)) < 1:
        raise ValueError(f"attention_keep={keep} of {groups} key/value groups leaves none: keep more")
    return kept


@dataclass(frozen=True)
class Narrowing:
    """How the MLPs of a model become narrower, and its attention if asked for.

    Attributes:
        model: The model.
        layers: The decoder layers, with the matrices that read neurons.
        neurons: The groups of neurons by the name of the layer.
        widths: How many neurons stay, by how many there are and how many go together.
        numbers: By the names that lead there, what the config says and is to say.
    """

    model: nn.Module
    layers: list[DecoderLayer]
    neurons: dict[str, list[Neurons]]
    widths: dict[tuple[int, int], int]
    numbers: dict[Path, tuple[int, int]]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        kept: Callable[[int], int],
        layers: str | None = None,
        groups: Callable[[int], int] | None = None,
    ) -> "Narrowing":
        """Find out what is to be done to a model.

        Args:
            model: The model, in eval mode.
            kept: Says how many of so many neurons stay.
            layers: Name of the list of decoder layers, where the rule for finding it fails.
            groups: Says how many of so many key/value groups of attention stay. Default: all.

        Returns:
            What is to be done; nothing has changed.

        Raises:
            ValueError: If it cannot be done.
        """
        check_can_change_shape(model)
        decoder = decoder_layers(model, targets=["*"], layers=layers)
        neurons = find_neurons(model, decoder)
        widths = {(width, 1): kept(width) for width in sorted({x.width for each in neurons.values() for x in each})}
        numbers: dict[Path, tuple[int, int]] = {}
        base = described(model)
        if groups is not None and (left := groups((heads := Heads.of(model)).groups)) < heads.groups:
            numbers = heads.numbers(left)
            widths[heads.groups * heads.block, heads.block] = left * heads.block
            of_heads, base = find_heads(model, decoder, heads, left)
            neurons = {name: [*of_heads[name], *each] for name, each in neurons.items()}
        every = [group for each in neurons.values() for group in each]
        check_finite(linear for group in every for linear in group.linears)
        decoder = [replace(layer, linears=[group.reader for group in neurons[layer.name]]) for layer in decoder]
        return cls(model, decoder, neurons, widths, numbers | _numbers(model, base, every, widths))

    @property
    def groups(self) -> list[Neurons]:
        """All groups of neurons."""
        return [group for each in self.neurons.values() for group in each]

    def kept(self, group: Neurons) -> int:
        """Say how many of some neurons stay."""
        return self.widths[group.width, group.block]

    def apply(self, kept: Mapping[str, Tensor]) -> None:
        """Remove the other neurons, and let the config say so.

        Args:
            kept: By the name of each reading matrix, the neurons that stay, ascending, shape (K,).
        """
        before = skeleton(self.model)
        for layer in self.layers:
            groups = self.neurons[layer.name]
            keep_neurons(groups, [kept[group.reader.name] for group in groups])
        for path, (width, number) in self.numbers.items():
            set_number(self.model, path, width, number)
        take_over(self.model, before, skeleton(self.model))

    def apply_first(self) -> None:
        """Keep the first neurons of each group, whichever they are: values of other neurons are to be loaded."""
        self.apply({group.reader.name: torch.arange(self.kept(group), device="cpu") for group in self.groups})


def _numbers(
    model: nn.Module, base: nn.Module, groups: list[Neurons], widths: Mapping[tuple[int, int], int]
) -> dict[Path, tuple[int, int]]:
    """Find the numbers of the config that say how many neurons there are, by what they do to a model without values.

    Args:
        model: The model.
        base: It without values, as its config describes it with the heads that stay.
        groups: All its neurons.
        widths: How many stay.
    """
    empty = described(model)
    modules = dict(own_modules(empty))
    twins = {module: modules[name] for name, module in own_modules(model)}
    there = [group.within(twins) for group in groups]
    keep_neurons(there, [torch.arange(widths[group.width, group.block], device="cpu") for group in there])
    changed = {width: kept for (width, block), kept in widths.items() if block == 1 and width != kept}
    return find_numbers(base, changed, shapes_of(empty))
