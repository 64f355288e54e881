"""How much of each linear is pruned, decided by looking at the model: what all such allocations have in common."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from wanda_lightning.arguments import as_call, attributes_of, without_addresses
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.feed import Feed
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.calibration.walk import walk
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.names import name_without_adapters
from wanda_lightning.report.allotment import Allotment
from wanda_lightning.sparsity import Pattern, Unstructured, as_pattern
from wanda_lightning.statistics import InputNorm, InputStatistic, sum_norms


class CannotSplitError(ValueError):
    """An allocator cannot split a sparsity as it says; another sparsity it could."""


class Team(Protocol):
    """The processes that have the other parts of the calibration set, see ``engine/processes.py``."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes."""

    def together(self) -> AbstractContextManager[None]:
        """Raise in every process what one of them raises."""


@dataclass(frozen=True)
class Task:
    """What an allocator looks at.

    Attributes:
        model: The causal language model; dense, in eval mode.
        layers: Its decoder layers, with the linears that are to be pruned; each matrix once.
        method: What they will be pruned with.
        pattern: What was asked for; its sparsity is that of all linears together.
        batches: The calibration set of this process.
        team: Those that have the other parts of it; all of them have to find the same.
        activations: Where hidden states wait between two layers.
        feed: Runs the model on a batch; None for a language model.
        dense_target: Whether linears are fitted to what they give in the dense model before they are pruned.
    """

    model: nn.Module
    layers: Sequence[DecoderLayer]
    method: PruningMethod
    pattern: Pattern
    batches: Sequence[Batch]
    team: Team
    activations: Place = "device"
    feed: Feed | None = None
    dense_target: bool = False

    @property
    def linears(self) -> list[PrunableLinear]:
        """The linears that are to be pruned."""
        return [linear for layer in self.layers for linear in layer.linears]

    @property
    def pruned_layers(self) -> list[DecoderLayer]:
        """The layers in which something is to be pruned."""
        return [layer for layer in self.layers if layer.linears]

    def input_norms(self, batches: Sequence[Batch] | None = None) -> dict[str, InputStatistic]:
        """Take the calibration set, or a part of it, through the dense model.

        Args:
            batches: The part. Default: all.

        Returns:
            The norms of what enters each linear, by name, over all processes.
        """
        batches = self.batches if batches is None else batches
        norms: dict[str, InputStatistic] = {}
        with self.team.together():
            for step in walk(self.model, self.layers, batches, self.activations, feed=self.feed, statistic=InputNorm):
                if step.layer.linears:
                    norms |= step.collect(InputNorm, advance=True)
        sum_norms([*{id(norm): norm for norm in norms.values()}.values()], self.team.sum)
        return norms


class Allocator(ABC):
    """Decides how much of each linear is pruned, before anything is pruned. The total stays what was asked for."""

    needs_batches: bool = True
    """Whether there has to be a calibration set."""

    def __repr__(self) -> str:
        """Name the allocation and its settings; attributes that begin with an underscore are none."""
        return as_call(self, attributes_of(self))

    def __str__(self) -> str:
        """Name it alike in every process: resumed runs know it by that."""
        return without_addresses(repr(self))

    def check_pattern(self, pattern: Pattern) -> None:
        """Refuse a pattern that leaves nothing to split.

        Args:
            pattern: What is asked for.

        Raises:
            ValueError: If it is N:M.
        """
        if not isinstance(pattern, Unstructured):
            raise ValueError(
                f"{self} splits an unstructured sparsity among linears, and {pattern} is the same for all: give a "
                "sparsity instead, or leave the allocation out"
            )

    def check(self, task: Task) -> None:
        """Refuse what it cannot split, before any work is done.

        Args:
            task: What is asked for; its batches may be missing still.

        Raises:
            ValueError: If it cannot.
        """
        self.check_pattern(task.pattern)

    @abstractmethod
    def allocate(self, task: Task) -> Allotment:
        """Decide.

        Args:
            task: What is asked for.

        Returns:
            A pattern for each linear of the task.
        """

    def allotment(
        self,
        patterns: Mapping[str, Pattern],
        story: str = "",
        figure: str = "",
        reasons: Mapping[str, float] | None = None,
    ) -> Allotment:
        """Note down what was decided.

        Args:
            patterns: By the name of the linear.
            story: What was found on the way, in a few words.
            figure: What the figures of ``reasons`` are.
            reasons: By the name of the linear, the figure that decided.

        Returns:
            All that, as plain types.
        """
        plain = {
            name_without_adapters(name): pattern.sparsity if isinstance(pattern, Unstructured) else str(pattern)
            for name, pattern in patterns.items()
        }
        figures = {name_without_adapters(name): reason for name, reason in (reasons or {}).items()}
        return Allotment(str(self), story, figure, plain, figures)


def patterns_of(allotment: Allotment, linears: Iterable[PrunableLinear]) -> dict[str, Pattern]:
    """Return the patterns that linears were given, by their names."""
    return {linear.name: as_pattern(allotment.patterns[name_without_adapters(linear.name)]) for linear in linears}


def layer_shares(task: Task, shares: Sequence[float], by: str) -> dict[str, Pattern]:
    """Give all linears of a layer the same sparsity, so that the total is exact.

    Args:
        task: What is asked for.
        shares: A sparsity for each layer in which something is pruned.
        by: What made them, for errors.

    Returns:
        The patterns by linear name.

    Raises:
        CannotSplitError: If a sparsity is outside of [0, 1).
    """
    asked: dict[str, float] = {}
    for layer, share in zip(task.pruned_layers, shares, strict=True):
        if not 0 <= share < 1:
            raise CannotSplitError(f"{by} gives {layer.name} a sparsity of {share:.4f}, outside of [0, 1)")
        asked |= {linear.name: share for linear in layer.linears}
    return exact(task.linears, asked)


def exact(linears: Sequence[PrunableLinear], shares: Mapping[str, float]) -> dict[str, Pattern]:
    """Round sparsities so that whole numbers of weights go from every row, and the total does not suffer.

    Each is rounded up or down. What that adds or takes is carried over to the next linear, from those with many rows to
    those with few, so that the sum over all linears is off by half a weight in each row of one linear at most. A row
    keeps one weight at least, which is more than asked for where it has fewer than 1 / (1 - sparsity).

    Args:
        linears: The linears.
        shares: Sparsities by name, in [0, 1).

    Returns:
        The patterns by name.
    """
    patterns: dict[str, Pattern] = {}
    owed = 0.0
    for linear in sorted(linears, key=lambda linear: -len(linear.weight_OI)):
        rows, columns = linear.weight_OI.shape
        wanted = shares[linear.name] * columns
        owed += wanted * rows
        count = min(max(math.floor(wanted), round(owed / rows)), math.ceil(wanted), columns - 1)
        owed -= count * rows
        patterns[linear.name] = Unstructured(count / columns)
    return patterns


def weighted_mean(values: Sequence[float], layers: Sequence[DecoderLayer]) -> float:
    """Average a value of each layer over the weights that are to be pruned."""
    sizes = [sum(linear.weight_OI.numel() for linear in layer.linears) for layer in layers]
    return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)
