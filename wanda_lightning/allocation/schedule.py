"""How sparsity grows where a model is pruned in several steps while it trains."""

from dataclasses import dataclass
from typing import Literal

from wanda_lightning.allocation.allocator import Allocator
from wanda_lightning.allocation.by_name import Allocation
from wanda_lightning.arguments import is_fraction, one_of, plain_fields, whole_number
from wanda_lightning.methods import PruningMethod
from wanda_lightning.sparsity import Pattern, Unstructured

Curve = Literal["cubic", "linear"]


@dataclass(frozen=True)
class Gradual:
    """Prunes a little more every few steps, up to the final sparsity (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1).

    At step t between ``start`` and ``end`` the sparsity is s_f + (s_i - s_f) (1 - (t - start) / (end - start))^p with
    p = 3 for the cubic curve, which prunes most in the beginning, and p = 1 for the linear one. Steps are optimizer
    steps.

    Args:
        start: Step from which sparsity grows, >= 0. Nothing is pruned there unless ``initial`` says so.
        end: Step of the last pruning, > start; training has to go on at least as long.
        every: Steps between two prunings, >= 1.
        curve: ``"cubic"`` or ``"linear"``.
        initial: Sparsity s_i at ``start``, in [0, 1).
        regrow: Let pruned weights train between two prunings, so that the next one may choose others: iterative hard
            thresholding. After the last one they are zero for good. Otherwise what is pruned once stays pruned.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> schedule = Gradual(start=0, end=100, every=25)
        >>> [round(schedule.sparsity(step, final=0.6), 4) for step in (0, 25, 50, 75, 100)]
        [0.0, 0.3469, 0.525, 0.5906, 0.6]
    """

    start: int
    end: int
    every: int = 1
    curve: Curve = "cubic"
    initial: float = 0.0
    regrow: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        whole_number("start of a gradual schedule", self.start, 0)
        whole_number("end of a gradual schedule", self.end, self.start + 1)
        whole_number("every of a gradual schedule", self.every, 1)
        one_of("curve", self.curve, Curve)
        if not is_fraction(self.initial):
            raise ValueError(f"initial must be a sparsity in [0, 1), got {self.initial!r}")

    def sparsity(self, step: int, final: float) -> float:
        """Return the fraction to be pruned at a step.

        Args:
            step: Optimizer steps taken.
            final: Sparsity s_f from ``end`` on, in [0, 1).

        Returns:
            0 before ``start``, ``final`` from ``end`` on.
        """
        if step < self.start:
            return 0.0
        if step >= self.end:
            return final
        left = 1 - (step - self.start) / (self.end - self.start)
        return final + (self.initial - final) * left ** (3 if self.curve == "cubic" else 1)

    def last_due(self, step: int) -> int | None:
        """Return the last step up to the given one at which to prune, or None before ``start``.

        Prunings are due every few steps from ``start`` on, and at ``end`` in any case.
        """
        if step >= self.end:
            return self.end
        return None if step < self.start else step - (step - self.start) % self.every

    def check(
        self,
        method: PruningMethod,
        pattern: Pattern,
        allocation: Allocation | Allocator | None,
        dense_target: bool = False,
    ) -> None:
        """Refuse what cannot be pruned in several steps.

        Args:
            method: The pruning method.
            pattern: What is pruned to in the end.
            allocation: What holds instead for some of the linears.
            dense_target: Whether weights are fitted to the dense model before they are pruned.

        Raises:
            ValueError: If the pattern is N:M or not the same for all, the schedule starts above it, the method may
                bring back what it pruned before, or a dense model is aimed at: there is one at the first step only.
        """
        if dense_target:
            raise ValueError("a gradual schedule goes on from a pruned model: leave dense_target or schedule out")
        if not isinstance(pattern, Unstructured):
            raise ValueError(f"a gradual schedule prunes unstructured patterns only, got {pattern}: leave schedule out")
        if allocation is not None:
            raise ValueError(
                f"a gradual schedule prunes all linears alike, got the allocation {allocation}: leave one out"
            )
        if self.initial > pattern.sparsity:
            raise ValueError(f"the schedule starts at sparsity {self.initial}, above the final {pattern.sparsity}")
        if not method.zeros_stay and not self.regrow:
            raise ValueError(
                f"{method} updates weights before it chooses among them, so weights that were pruned may come back: "
                "use regrow=True in the schedule, or a method that chooses first, such as Wanda or a sequential Ablate"
            )

    def check_steps(self, steps: float) -> None:
        """Refuse a training that ends before the schedule does.

        Args:
            steps: Its optimizer steps; below 0 where nobody knows, as where epochs of a stream are trained.

        Raises:
            ValueError: If they are too few.
        """
        if 0 <= steps < self.end:
            raise ValueError(f"the gradual schedule ends at step {self.end}, training at step {steps:g}")
