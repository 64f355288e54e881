"""What is to be pruned of a model, to what and by what: made and checked before any weight changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from wanda_lightning.engine.settings import PruningSettings
from wanda_lightning.engine.shared_weights import Repeat, without_repeats
from wanda_lightning.engine.stacks import Found
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.neurons import Neurons
from wanda_lightning.report.allotment import Allotment
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Pattern


@dataclass(frozen=True, kw_only=True)
class Plan(PruningSettings):
    """A pruning of one model: what is asked for, and what was found in the model.

    Attributes:
        layers: The decoder layers, with the linears that are to be pruned.
        patterns: What each linear is pruned to, by name.
        repeats: Linears whose matrix an earlier one has.
        outside: Matrices outside of the layers, with the reason why they stay dense; of language models, none.
        allotment: What an allocator has decided; None before that, and where there is none.
        neurons: Those that may stand in another order, by the name of the layer; none unless that is asked for.
        passed_by: Layers in which nothing is to be pruned, and which the model does not call.
    """

    layers: list[DecoderLayer]
    patterns: Mapping[str, Pattern]
    repeats: list[Repeat] = field(default_factory=list)
    outside: Mapping[str, str] = field(default_factory=dict)
    allotment: Allotment | None = None
    neurons: Mapping[str, list[Neurons]] = field(default_factory=dict)
    passed_by: Sequence[DecoderLayer] = ()

    @classmethod
    def of(cls, model: nn.Module, asked: PruningSettings, found: Found) -> "Plan":
        """Find out what is to be done to a model.

        Args:
            model: The model, with its decoder layers.
            asked: What is asked for.
            found: Its layers, and the selection with their names.

        Returns:
            The plan.

        Raises:
            ValueError: If the selection does not fit the model.
        """
        every, patterns = found.selection.choose(model, asked.pattern)
        called = [layer for layer in every if layer.name not in found.uncalled]
        layers, repeats = without_repeats(model, found.in_order(called), patterns, found.uncalled)
        return cls(
            **{**vars(asked), "selection": found.selection},
            layers=layers,
            patterns=patterns,
            repeats=repeats,
            outside=found.look_outside(model, layers),
            passed_by=[layer for layer in every if layer.name in found.uncalled],
        )

    @property
    def linears(self) -> list[PrunableLinear]:
        """The linears that are to be pruned."""
        return [linear for layer in self.layers for linear in layer.linears]

    def described(self) -> dict[str, Any]:
        """Return what decides the result, as plain types."""
        described = {**super().described(), "layers": self.selection.layers, "exact_error": self.exact_error}
        if not self.true_sequential:  # as runs before there was a choice say
            described.pop("true_sequential", None)
        return described

    def new_report(self) -> PruningReport:
        """Begin the report."""
        report = PruningReport(str(self.method), str(self.pattern), self.pattern.sparsity)
        every = [*self.layers, *self.passed_by]
        report.matches = self.selection.matches(every)
        report.allocation = self.allotment
        for layer in every:
            report.not_pruned |= layer.left_dense
        report.not_pruned |= self.outside
        return report
