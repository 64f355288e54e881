"""What a user asks of a pruning, whatever the model."""

from dataclasses import dataclass, field
from typing import Any

from wanda_lightning.allocation.selection import Selection
from wanda_lightning.arguments import instance_or_none
from wanda_lightning.calibration.input_drift import InputDrift
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.sparsity import Pattern, SemiStructured
from wanda_lightning.statistics import InputHessian, InputNorm, InputStatistic


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """What is asked of a pruning, whatever the model.

    Attributes:
        method: The pruning method.
        pattern: What linears are pruned to, where the selection says nothing else.
        selection: What the user said of linears.
        exact_error: Whether X^T X is gathered whatever the method.
        true_sequential: Whether each linear is pruned with what the pruned linears before it give, also those of its
            own layer, in one pass over the calibration set; None while that is to depend on the memory.
        reconstruction: How what is kept of each layer is then trained; None where it is not.
        dense_target: Whether linears are fitted to what they give in the dense model before they are pruned.
        permute: Whether the neurons of MLPs stand in the order in which an N:M pattern loses least.

    Raises:
        ValueError: If one is of another kind than it should be, or they contradict each other.
    """

    method: PruningMethod
    pattern: Pattern
    selection: Selection = field(default_factory=Selection)
    exact_error: bool = False
    true_sequential: bool | None = None
    reconstruction: Reconstruction | None = None
    dense_target: bool = False
    permute: bool = False

    def __post_init__(self) -> None:
        self.method.check(self.pattern)
        if self.selection.allocator is not None:
            self.selection.allocator.check_pattern(self.pattern)
        instance_or_none("reconstruction", self.reconstruction, Reconstruction, "Reconstruction(epochs=3)")
        if self.permute and not isinstance(self.pattern, SemiStructured):
            raise ValueError(
                f'permute chooses what stands together in the groups of an N:M pattern such as "2:4", got '
                f"{self.pattern}: leave permute out"
            )
        if self.statistic is not (own := self.method.statistic) and own not in (None, InputNorm, InputHessian):
            setting = "dense_target" if self.dense_target else "exact_error"
            raise ValueError(f"{setting} gathers X^T X, and {self.method} needs {own.__name__}: leave {setting} out")
        if self.dense_target and self.true_sequential is False:
            raise ValueError("dense_target needs one pass through each layer: leave true_sequential=False out")

    @property
    def statistic(self) -> type[InputStatistic] | None:
        """What is gathered of the inputs of linears; None where nothing is."""
        if self.dense_target:
            return InputDrift
        return InputHessian if self.exact_error else self.method.statistic

    @property
    def asks_for_batches(self) -> str | None:
        """The first setting that cannot do without a calibration set, as users write it; None where there is none."""
        asking = {
            str(self.method): self.method.statistic is not None,
            "exact_error": self.exact_error,
            "dense_target": self.dense_target,
            str(self.reconstruction): self.reconstruction is not None,
            str(self.selection.allocator): self.selection.needs_batches,
        }
        return next((setting for setting, asks in asking.items() if asks), None)

    def described(self) -> dict[str, Any]:
        """Return what tells results apart, as plain types; what older versions did not know only where it is asked."""
        selection = self.selection
        return {
            "method": str(self.method),
            "pattern": str(self.pattern),
            "sparsity": self.pattern.sparsity,
            "targets": selection.targets,
            "ignore": selection.ignore,
            "allocation": str(selection.allocator) if selection.allocator else selection.by_name,
            **({} if self.true_sequential is None else {"true_sequential": self.true_sequential}),
            **({"reconstruction": str(self.reconstruction)} if self.reconstruction else {}),
            **({"dense_target": True} if self.dense_target else {}),
            **({"permute": True} if self.permute else {}),
        }
