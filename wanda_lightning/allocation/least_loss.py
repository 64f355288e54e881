"""Least loss: what a little more sparsity of each linear costs is measured, and the total is split by that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wanda_lightning.allocation.allocator import Allocator, Allotment, Task, exact
from wanda_lightning.allocation.split import cheapest_split
from wanda_lightning.allocation.trial import Trials, first_sequences, fitted, held_out, refuse_what_cannot_be_tried
from wanda_lightning.arguments import positive_number, whole_number
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.names import kind_of
from wanda_lightning.sparsity import Pattern, Unstructured, as_pattern

MOST = 0.95
"""No linear is pruned further: what a model loses with a whole linear, no slope tells."""

Unit = list[PrunableLinear]
"""Linears that are pruned alike: one, or all the experts of one kind in a layer."""


@dataclass(frozen=True)
class LeastLoss(Allocator):
    """Prune most where it costs the least loss, as measured in the pruned model.

    The error of linear u pruned to p is taken to be c_u * E_u(p). E_u is the energy ||(W - W') X||^2 that its outputs
    lose, known for every p from one pass over the calibration set. c_u says what that does to the loss of the model: of
    the model in which all linears are pruned, each is pruned half a step more and half a step less, and the growth of
    the loss is shared out among them by one backward pass (:meth:`Trials.slopes`). The split with the least sum of
    errors is found exactly, over a grid of sparsities. As c_u holds nearby only, no linear moves by more than a step;
    then c_u is measured anew, as long as the loss on held-out calibration text falls.

    Args:
        choices: Patterns to choose from for every linear, such as ``["dense", "4:8", "2:4"]``; the sparsity asked for
            is then the least that all together have. Default: any sparsity on the grid.
        step: Distance of the grid's sparsities, in (0, 0.25].
        rounds: How often to measure and split at most, >= 1.
        sequences: Calibration sequences that c_u is measured on, >= 1; a quarter of the calibration set is held out.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> LeastLoss()
        LeastLoss(choices=None, step=0.05, rounds=4, sequences=8)
    """

    choices: Sequence[str] | None = None
    step: float = 0.05
    rounds: int = 4
    sequences: int = 8

    def __post_init__(self) -> None:
        positive_number("step", self.step)
        if self.step > 0.25:
            raise ValueError(f"step must be in (0, 0.25], got {self.step!r}")
        whole_number("rounds", self.rounds, 1)
        whole_number("sequences", self.sequences, 1)
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))
            if len({*map(_choice, self.choices)}) < max(2, len(self.choices)):
                raise ValueError(f"choices must be two or more different patterns, got {[*self.choices]}")

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
        for pattern in map(_choice, self.choices or ()):
            task.method.check(pattern)
            for linear in task.linears:
                pattern.check_in_features(linear.weight_OI.shape[1], linear.name)
        most = max(option.sparsity for option in self._options(task.pattern.sparsity)) if self.choices else MOST
        if task.pattern.sparsity > most:
            raise ValueError(f"{self} prunes no linear more than {most:g}, got a sparsity of {task.pattern.sparsity:g}")

    def allocate(self, task: Task) -> Allotment:
        """Measure and split until the loss on held-out text does not fall any more.

        Args:
            task: What is asked for.

        Returns:
            A pattern for each linear.
        """
        asked, units = task.pattern.sparsity, units_of(task)
        options, judged_on = self._options(asked), held_out(task.batches)
        gains, total = self._gains(units, options, asked)
        measured_on = first_sequences(fitted(task.batches), self.sequences)
        with Trials(task, task.input_norms()) as trials:
            errors = [[sum(trials.lost(x.name, option) for x in unit) for option in options] for unit in units]
            at, slopes = [asked] * len(units), [0.0] * len(units)
            tried: list[tuple[float, dict[str, Pattern], list[float]]] = []
            if not self.choices:
                alike = dict(exact(task.linears, dict.fromkeys((x.name for x in task.linears), asked)))
                tried.append((trials.loss(alike, judged_on), alike, slopes))
            for _ in range(self.rounds):
                slopes, weights = self._measure(trials, units, at, measured_on)
                costs = [
                    [
                        weight * error if self.choices or abs(option.sparsity - now) < 1.01 * self.step else math.inf
                        for error, option in zip(each, options, strict=True)
                    ]
                    for weight, each, now in zip(weights, errors, at, strict=True)
                ]
                picked = [options[n] for n in cheapest_split(costs, gains, total, over=self.choices is not None)]
                patterns = self._patterns(task, units, picked)
                tried.append((trials.loss(patterns, judged_on), patterns, slopes))
                if len(tried) > 1 and tried[-1][0] >= tried[-2][0]:
                    break
                at = [option.sparsity for option in picked]
        _, patterns, slopes = min(tried, key=lambda each: each[0])
        why = "held-out loss " + ", then ".join(f"{loss:.3f}" for loss, _, _ in tried)
        reasons = {x.name: slope for unit, slope in zip(units, slopes, strict=True) for x in unit}
        return Allotment.of(self, why, patterns, reasons)

    def _options(self, asked: float) -> list[Pattern]:
        """List what a linear may be pruned to: the choices, or sparsities around the one asked for."""
        if self.choices:
            return sorted(map(_choice, self.choices), key=lambda pattern: pattern.sparsity)
        grid = [asked + place * self.step for place in range(-self.rounds, self.rounds + 1)]
        return [Unstructured(sparsity) for sparsity in grid if sparsity == asked or 0 <= sparsity <= MOST]

    def _gains(
        self, units: Sequence[Unit], options: Sequence[Pattern], asked: float
    ) -> tuple[list[list[int]], int]:
        """Count what each option of each unit adds to the total, and what the total has to be."""
        sizes = [sum(linear.weight_OI.numel() for linear in unit) for unit in units]
        if self.choices:
            return [[round(size * option.sparsity) for option in options] for size in sizes], round(asked * sum(sizes))
        middle = [option.sparsity for option in options].index(asked)
        return [[size * place for place in range(len(options))] for size in sizes], sum(sizes) * middle

    def _measure(
        self, trials: Trials, units: Sequence[Unit], at: Sequence[float], batches: Sequence[Batch]
    ) -> tuple[list[float], list[float]]:
        """Return by how much the loss grows per unit's sparsity, and per energy that its outputs lose."""
        ends = [(max(0.0, now - self.step / 2), min(0.99, now + self.step / 2)) for now in at]
        less, more = (
            {x.name: Unstructured(end[side]) for unit, end in zip(units, ends, strict=True) for x in unit}
            for side in (0, 1)
        )
        parts = trials.slopes(less, more, batches)
        grown = [sum(parts[x.name] for x in unit) for unit in units]
        weights = [
            max(growth, 0.0) / sum(trials.lost(x.name, more[x.name]) - trials.lost(x.name, less[x.name]) for x in unit)
            for growth, unit in zip(grown, units, strict=True)
        ]
        return [growth / (high - low) for growth, (low, high) in zip(grown, ends, strict=True)], weights

    def _patterns(self, task: Task, units: Sequence[Unit], picked: Sequence[Pattern]) -> dict[str, Pattern]:
        """Give every linear what its unit gets; sparsities are rounded so that the total is exact."""
        found = {x.name: pattern for unit, pattern in zip(units, picked, strict=True) for x in unit}
        if self.choices:
            return found
        return dict(exact(task.linears, {name: pattern.sparsity for name, pattern in found.items()}))


def units_of(task: Task) -> list[Unit]:
    """Group linears that are pruned alike: the experts of one kind in a layer."""
    units: dict[tuple[str, str], Unit] = {}
    for layer in task.layers:
        for linear in layer.linears:
            units.setdefault((layer.name, kind_of(linear.name, layer.name)), []).append(linear)
    return [*units.values()]


def _choice(choice: str) -> Pattern:
    return Unstructured(0.0) if choice == "dense" else as_pattern(choice)
