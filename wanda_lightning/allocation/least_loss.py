"""Least loss: what a little more sparsity of each linear costs is measured, and the total is split by that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from wanda_lightning.allocation.allocator import Allocator, CannotSplitError, Task, exact
from wanda_lightning.allocation.split import cheapest_split
from wanda_lightning.allocation.trial import Trials, parted, refuse_what_cannot_be_tried
from wanda_lightning.arguments import plain_fields, positive_up_to, whole_number
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.names import kind_of
from wanda_lightning.report.allotment import Allotment
from wanda_lightning.sparsity import Pattern, Unstructured, as_pattern

MOST = 0.95
"""No linear is pruned further: what a model loses with a whole linear, no slope tells."""

LEAST = 0.1
"""Of the mean growth of the loss per weight: so much any linear is taken to cost, whatever was measured."""

REACH, REACH_TO_DENSE = 0.75, 0.5
"""How much of the way to the best split is gone, without and with a dense target."""

Value = TypeVar("Value")
Unit = list[PrunableLinear]
"""Linears that are pruned alike: one, or all the experts of one kind in a layer."""


@dataclass(frozen=True)
class LeastLoss(Allocator):
    """Prune most where it costs the least loss, as measured in the pruned model.

    The error of linear u pruned to p is taken to be c_u * E_u(p). E_u is the energy ||(W - W') X||^2 that its outputs
    lose, known for every p from one pass over the calibration set. c_u says what that does to the loss of the model: of
    the model in which all linears are pruned, each is pruned half a step more and half a step less, and the growth of
    the loss is shared out among them by one backward pass (:meth:`Trials.slopes`). The split with the least sum of
    errors is found exactly, over a grid of sparsities. As c_u holds nearby only, no linear is pruned more than a step
    further at a time; then c_u is measured anew, as long as the loss on held-out calibration text falls.

    It takes gradients of the whole model, so there has to be room for its weights four times.

    Args:
        choices: Patterns to choose from for every linear, such as ``["dense", "4:8", "2:4"]``; the sparsity asked for
            is then the least that all together have, and c_u is measured once. Default: any sparsity on the grid.
        step: Distance of the grid's sparsities, in (0, 0.25].
        rounds: How often to measure and split at most, >= 1.
        sequences: Calibration sequences to measure on, >= 1; as many others, of a quarter of the calibration set that
            is held out, judge the splits.
        reach: How much of the way from an even split to that one is gone, in (0, 1]; not with choices. Default: 0.75,
            for the slopes are measured on few tokens; with ``dense_target`` 0.5, for later layers make up for part of
            what earlier ones lose, and the trials do not know.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> LeastLoss()
        LeastLoss(choices=None, step=0.05, rounds=4, sequences=8, reach=None)
    """

    choices: Sequence[str] | None = None
    step: float = 0.05
    rounds: int = 4
    sequences: int = 8
    reach: float | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        positive_up_to("step", self.step, 0.25)
        if self.reach is not None:
            positive_up_to("reach", self.reach, 1)
        whole_number("rounds", self.rounds, 1)
        whole_number("sequences", self.sequences, 1)
        if self.choices is not None:
            if self.reach is not None:
                raise ValueError(f"reach is not for choices, got reach={self.reach!r}: leave it out")
            is_list = isinstance(self.choices, Sequence) and not isinstance(self.choices, str)
            if not is_list or len({*map(_choice, self.choices)}) < max(2, len(self.choices)):
                raise ValueError(f"choices must be a list of two or more different patterns, got {self.choices!r}")
            object.__setattr__(self, "choices", [*self.choices])  # as it is written

    def check(self, task: Task) -> None:
        """Refuse what cannot be split.

        Args:
            task: What is asked for.

        Raises:
            ValueError: If the pattern is N:M, choices do not suit it, the method or a linear, or the model cannot be
                run as a whole.
        """
        super().check(task)
        refuse_what_cannot_be_tried(task, str(self))
        asked, choices = task.pattern.sparsity, [*map(_choice, self.choices or ())]
        for pattern in choices:
            task.method.check(pattern)
            for linear in task.linears:
                pattern.check_in_features(linear.weight_OI.shape[1], linear.name)
        if asked > (most := max((choice.sparsity for choice in choices), default=MOST)):
            raise CannotSplitError(f"{self} prunes no linear more than {most:g}, got a sparsity of {asked:g}")

    def allocate(self, task: Task) -> Allotment:
        """Measure and split until the loss on held-out text does not fall any more.

        Args:
            task: What is asked for.

        Returns:
            A pattern for each linear.
        """
        asked, units = task.pattern.sparsity, units_of(task)
        options = self._options(asked)
        gains, total = self._gains(units, options, asked)
        measured_on, judged_on = parted(task.batches, self.sequences)
        with Trials(task, task.input_norms(measured_on)) as trials:
            errors = [[trials.lost(unit, option) for option in options] for unit in units]
            now: list[Pattern] = [Unstructured(asked)] * len(units)
            tried = [] if self.choices else [(trials.loss(_by_name(units, now), judged_on), now, [0.0] * len(units))]
            for _ in range(1 if self.choices else self.rounds):
                slopes, weights = self._measure(trials, units, now, measured_on)
                costs = [
                    [math.inf if self._out_of_reach(o, at) else w * e for o, e in zip(options, each, strict=True)]
                    for w, each, at in zip(weights, errors, now, strict=True)
                ]
                now = [options[n] for n in cheapest_split(costs, gains, total, over=self.choices is not None)]
                tried.append((trials.loss(_by_name(units, now), judged_on), now, slopes))
                if len(tried) > 1 and tried[-1][0] >= tried[-2][0]:
                    break
        _, best, slopes = min(tried, key=lambda each: each[0])
        patterns = _by_name(units, best)
        story = "held-out loss " + ", then ".join(f"{loss:.3f}" for loss, _, _ in tried)
        if not self.choices:
            reach = self.reach or (REACH_TO_DENSE if task.dense_target else REACH)
            shares = {name: asked + reach * (pattern.sparsity - asked) for name, pattern in patterns.items()}
            patterns = exact(task.linears, shares)
            story += f"; {reach:.0%} of the way to the best split"
        return self.allotment(patterns, story, "loss / sparsity", _by_name(units, slopes))

    def _options(self, asked: float) -> list[Pattern]:
        """List what a linear may be pruned to: the choices, or sparsities around the one asked for."""
        if self.choices:
            return sorted(map(_choice, self.choices), key=lambda pattern: pattern.sparsity)
        places = range(-math.floor(asked / self.step + 1e-9), self.rounds + 1)
        grid = [max(0.0, asked + place * self.step) for place in places]  # 0 is on it for 0.3 by 0.1, too
        return [Unstructured(sparsity) for sparsity in grid if sparsity == asked or sparsity <= MOST]

    def _gains(self, units: Sequence[Unit], options: Sequence[Pattern], asked: float) -> tuple[list[list[int]], int]:
        """Count what each option of each unit adds to the total, and what the total has to be."""
        sizes = [sum(linear.weight_OI.numel() for linear in unit) for unit in units]
        if self.choices:
            gains = [[round(size * option.sparsity) for option in options] for size in sizes]
            return gains, math.ceil(asked * sum(sizes) - 1e-6)
        return [[size * place for place in range(len(options))] for size in sizes], sum(sizes) * options.index(
            Unstructured(asked)
        )

    def _out_of_reach(self, option: Pattern, now: Pattern) -> bool:
        return self.choices is None and option.sparsity > now.sparsity + 1.01 * self.step

    def _measure(
        self, trials: Trials, units: Sequence[Unit], now: Sequence[Pattern], batches: Sequence[Batch]
    ) -> tuple[list[float], list[float]]:
        """Return by how much the loss grows per sparsity of each unit, and per energy that its outputs lose.

        Where it falls, it is taken to grow a little, for what is true of half a step is not of many.
        """
        less = [Unstructured(max(0.0, at.sparsity - self.step / 2)) for at in now]
        more = [Unstructured(min(0.99, at.sparsity + self.step / 2)) for at in now]
        parts = trials.slopes(_by_name(units, less), _by_name(units, more), batches)
        slopes = [
            sum(parts[linear.name] for linear in unit) / (high.sparsity - low.sparsity)
            for unit, low, high in zip(units, less, more, strict=True)
        ]
        sizes = [sum(linear.weight_OI.numel() for linear in unit) for unit in units]
        mean = max(sum(slopes), 1e-9) / sum(sizes)
        weights = []
        for unit, slope, size, low, high in zip(units, slopes, sizes, less, more, strict=True):
            energy = (trials.lost(unit, high) - trials.lost(unit, low)) / (high.sparsity - low.sparsity)
            weights.append(max(slope, LEAST * mean * size) / max(energy, 1e-30))
        return slopes, weights


def units_of(task: Task) -> list[Unit]:
    """Group linears that are pruned alike: the experts of one kind in a layer."""
    units: dict[tuple[str, str], Unit] = {}
    for layer in task.layers:
        for linear in layer.linears:
            units.setdefault((layer.name, kind_of(linear.name, layer.name)), []).append(linear)
    return [*units.values()]


def _by_name(units: Sequence[Unit], values: Sequence[Value]) -> dict[str, Value]:
    """Give every linear what its unit has."""
    return {linear.name: value for unit, value in zip(units, values, strict=True) for linear in unit}


def _choice(choice: str) -> Pattern:
    return Unstructured(0.0) if choice == "dense" else as_pattern(choice)
