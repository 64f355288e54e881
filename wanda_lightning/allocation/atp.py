"""ATP: sparsity grows by the same amount from layer to layer (Huang et al. 2025, arXiv:2502.14770)."""

from dataclasses import dataclass

from wanda_lightning.allocation.allocator import Allocator, Task, layer_shares, weighted_mean
from wanda_lightning.allocation.trial import Trials, parted, refuse_what_cannot_be_tried
from wanda_lightning.arguments import is_finite, plain_fields
from wanda_lightning.report.allotment import Allotment
from wanda_lightning.sparsity import Pattern

TRIED = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625)
"""Values of beta that are tried, as shares of the largest that is possible."""

SEQUENCES = 8
"""Calibration sequences that masks are chosen on, and held-out ones that judge them."""


@dataclass(frozen=True)
class ATP(Allocator):
    """Let the sparsity of decoder layers be an arithmetic progression (arXiv:2502.14770, section 4.3).

    Layer i of L is pruned to S - beta (L - 1) / 2 + beta (i - 1), or with layers of different sizes to what keeps the
    total at S: errors of early layers grow on the way through the later ones, so the early ones keep more. All linears
    of a layer are pruned alike.

    Args:
        beta: What is added from one layer to the next, below 2 min(S, 1 - S) / (L - 1) for layers of equal size.
            Default: the one of six, from 0 up, with which the pruned model predicts calibration text best that was
            held out. They are tried with Wanda, or with the method itself if that needs no Hessian.

    Raises:
        ValueError: If beta is not a finite number.

    Examples:
        >>> ATP(beta=0.01)
        ATP(beta=0.01)
    """

    beta: float | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.beta is not None and not is_finite(self.beta):
            raise ValueError(f"beta must be a finite number, or left out to be chosen, got {self.beta!r}")

    @property
    def needs_batches(self) -> bool:  # type: ignore[override]
        """Whether there has to be a calibration set: only to choose beta."""
        return self.beta is None

    def check(self, task: Task) -> None:
        """Refuse what cannot be split.

        Args:
            task: What is asked for.

        Raises:
            ValueError: If the pattern is N:M, beta leads outside of [0, 1), or it is to be chosen and that is not
                possible for this model.
        """
        super().check(task)
        if self.beta is not None:
            self._patterns(task, self.beta)
        else:
            refuse_what_cannot_be_tried(task, str(self))

    def allocate(self, task: Task) -> Allotment:
        """Choose beta if it is not given.

        Args:
            task: What is asked for.

        Returns:
            A sparsity for each linear.
        """
        if self.beta is not None:
            return self.allotment(self._patterns(task, self.beta))
        betas = [_largest_beta(task) * share for share in TRIED]
        measured_on, judged_on = parted(task.batches, SEQUENCES)
        with Trials(task, task.input_norms(measured_on)) as trials:
            losses = [trials.loss(self._patterns(task, beta), judged_on) for beta in betas]
        best = betas[losses.index(min(losses))]
        tried = ", ".join(f"{loss:.3f} with {beta:.4f}" for loss, beta in zip(losses, betas, strict=True))
        return self.allotment(self._patterns(task, best), f"beta {best:.4f}; held-out loss {tried}")

    def _patterns(self, task: Task, beta: float) -> dict[str, Pattern]:
        layers = task.pruned_layers
        steps = [beta * place for place in range(len(layers))]
        middle = weighted_mean(steps, layers)
        return layer_shares(task, [task.pattern.sparsity + step - middle for step in steps], str(self))


def _largest_beta(task: Task) -> float:
    """Find the step with which the first layer stays dense, or the last one loses all."""
    last = len(task.pruned_layers) - 1
    if not last:
        return 0.0
    middle = weighted_mean(range(last + 1), task.pruned_layers)
    return min(task.pattern.sparsity / middle, (1 - task.pattern.sparsity) / (last - middle))
