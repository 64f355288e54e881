"""What is to be pruned, to what and by what: made and checked before any weight changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from wanda_lightning.allocation.selection import Selection
from wanda_lightning.calibration.input_drift import InputDrift
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.engine.shared_weights import Repeat, without_repeats
from wanda_lightning.engine.stacks import Found
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.neurons import Neurons
from wanda_lightning.report.allotment import Allotment
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputHessian, InputStatistic


@dataclass(frozen=True)
class Plan:
    """A pruning of one model.

    Attributes:
        method: The pruning method.
        pattern: What linears are pruned to, where the selection says nothing else.
        selection: What the user said of linears.
        layers: The decoder layers, with the linears that are to be pruned.
        patterns: What each linear is pruned to, by name.
        repeats: Linears whose matrix an earlier one has.
        exact_error: Whether X^T X is gathered whatever the method.
        true_sequential: Whether each linear is pruned with what the pruned linears before it give, also those of its
            own layer, in one pass over the calibration set; None while that is to depend on the memory.
        reconstruction: How what is kept of each layer is then trained; None where it is not.
        outside: Matrices outside of the layers, with the reason why they stay dense; of language models, none.
        dense_target: Whether linears are fitted to what they give in the dense model before they are pruned.
        allotment: What an allocator has decided; None before that, and where there is none.
        neurons: Those that may stand in another order, by the name of the layer; none unless that is asked for.
        passed_by: Layers in which nothing is to be pruned, and which the model does not call.
    """

    method: PruningMethod
    pattern: Pattern
    selection: Selection
    layers: list[DecoderLayer]
    patterns: Mapping[str, Pattern]
    repeats: list[Repeat] = field(default_factory=list)
    exact_error: bool = False
    true_sequential: bool | None = None
    reconstruction: Reconstruction | None = None
    dense_target: bool = False
    outside: Mapping[str, str] = field(default_factory=dict)
    allotment: Allotment | None = None
    neurons: Mapping[str, list[Neurons]] = field(default_factory=dict)
    passed_by: Sequence[DecoderLayer] = ()

    @classmethod
    def of(cls, model: nn.Module, method: PruningMethod, pattern: Pattern, found: Found, **asked: Any) -> "Plan":
        """Find out what is to be done to a model.

        Args:
            model: The model, with its decoder layers.
            method: The pruning method.
            pattern: What linears are pruned to, where the selection says nothing else.
            found: Its layers, and what the user said of linears.
            **asked: What else the user said, by the names of the attributes.

        Returns:
            The plan.

        Raises:
            ValueError: If the selection does not fit the model.
        """
        every, patterns = found.selection.choose(model, pattern)
        called = [layer for layer in every if layer.name not in found.uncalled]
        layers, repeats = without_repeats(model, found.in_order(called), patterns, found.uncalled)
        outside = found.look_outside(model, layers)
        passed_by = [layer for layer in every if layer.name in found.uncalled]
        rest = {"outside": outside, "passed_by": passed_by, **asked}
        return cls(method, pattern, found.selection, layers, patterns, repeats, **rest)

    @property
    def linears(self) -> list[PrunableLinear]:
        """The linears that are to be pruned."""
        return [linear for layer in self.layers for linear in layer.linears]

    @property
    def statistic(self) -> type[InputStatistic] | None:
        """What is gathered of the inputs of linears; None where nothing is."""
        if self.dense_target:
            return InputDrift
        return InputHessian if self.exact_error else self.method.statistic

    @property
    def asks_for_batches(self) -> str | None:
        """What cannot do without a calibration set; None where nothing needs one."""
        return asks_for_batches(self.method, self.selection, self.exact_error, self.reconstruction, self.dense_target)

    @property
    def needs_batches(self) -> bool:
        """Whether there has to be a calibration set."""
        return self.asks_for_batches is not None

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as plain types."""
        return {
            "method": str(self.method),
            "pattern": str(self.pattern),
            "sparsity": self.pattern.sparsity,
            **vars(self.selection),
            **({"allocation": str(allocator)} if (allocator := self.selection.allocator) else {}),
            "exact_error": self.exact_error,
            **({"true_sequential": True} if self.true_sequential else {}),  # as runs before there was a choice say
            **({"reconstruction": str(self.reconstruction)} if self.reconstruction else {}),
            **({"dense_target": True} if self.dense_target else {}),
            **({"permute": True} if self.neurons else {}),
        }

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


def asks_for_batches(
    method: PruningMethod,
    selection: Selection,
    exact_error: bool,
    reconstruction: Reconstruction | None,
    dense_target: bool,
) -> str | None:
    """Say which setting cannot do without a calibration set.

    Args:
        method: See :class:`Plan`, as all.
        selection: A selection.
        exact_error: Whether exact errors are asked for.
        reconstruction: Settings, or None.
        dense_target: Whether linears are fitted first.

    Returns:
        The first such setting, as users write it; None where there is none.
    """
    asking = {
        str(method): method.statistic is not None,
        "exact_error": exact_error,
        "dense_target": dense_target,
        str(reconstruction): reconstruction is not None,
        str(selection.allocator): selection.needs_batches,
    }
    return next((setting for setting, asks in asking.items() if asks), None)
