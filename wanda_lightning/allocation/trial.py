"""Pruning a model for a trial: in a cheap way, looked at on calibration text that was held out, and taken back.

Shapes: B batch, T tokens, V vocabulary, O out features, I in features.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wanda_lightning.allocation.allocator import Task
from wanda_lightning.calibration.batches import Batch, held_out_batches, tensors_of
from wanda_lightning.calibration.calibrated_layer import OVERFLOW
from wanda_lightning.calibration.token_losses import NOTHING_PREDICTED, predicts_tokens, token_losses
from wanda_lightning.methods.magnitude import MagnitudeInRows
from wanda_lightning.methods.wanda import Wanda
from wanda_lightning.model.gradients import only_requiring_grad
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.offload import is_offloaded
from wanda_lightning.sparsity import Pattern
from wanda_lightning.statistics import InputNorm, InputStatistic

ROWS = 256
"""Rows of a matrix whose energies are measured."""


def parted(batches: Sequence[Batch], count: int) -> tuple[list[Batch], list[Batch]]:
    """Part a calibration set into what is measured on and what judges allocations: every fourth batch, at least one.

    Args:
        batches: The calibration set; of a batch that is alone, its sequences are parted.
        count: So many sequences of each part are enough.

    Returns:
        The two parts; where there is one sequence alone, it is in both.
    """
    batches = _several(batches)
    judging = range(1) if len(batches) == 1 else held_out_batches(len(batches), 1 / 4, "an allocation")
    measured = [batch for number, batch in enumerate(batches) if number not in judging or len(batches) == 1]
    return _first_sequences(measured, count), _first_sequences([batches[number] for number in judging], count)


def _several(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return the sequences of a batch that is the only one."""
    tensors = tensors_of(batches[0])
    rows = len(tensors["input_ids"])
    if len(batches) > 1 or rows == 1:
        return batches
    return [{name: tensor[row : row + 1] for name, tensor in tensors.items()} for row in range(rows)]


def _first_sequences(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return the first so many sequences, or all if there are fewer."""
    taken: list[Batch] = []
    for batch in batches:
        inputs = {name: tensor[:count] for name, tensor in tensors_of(batch).items()}
        taken += [inputs] if count > 0 else []
        count -= len(inputs["input_ids"])
    return taken


def refuse_what_cannot_be_tried(task: Task, by: str) -> None:
    """Refuse models and calibration sets that no trial can be made with.

    Args:
        task: What is asked for.
        by: Who wants to try, for the error.

    Raises:
        ValueError: If the model predicts no tokens, or is not in memory as a whole.
    """
    if not predicts_tokens(task.model):
        raise ValueError(
            f"{by} goes by how well next tokens are predicted, and {type(task.model).__name__} predicts none: use "
            "OWL, or ATP with a beta"
        )
    if is_offloaded(task.model):
        raise ValueError(
            f"{by} runs the whole model pruned in several ways, and some of its layers are not in memory: use OWL, or "
            "ATP with a beta"
        )


class Trials:
    """A model that is pruned in one way after the other, each time from its dense weights.

    The mask of each linear comes from the norms of its inputs in the dense model, so that a trial takes no more than
    choosing masks and running the model over the text it is judged on.

    Args:
        task: The model and its linears.
        norms: Of the inputs of each linear, by name.
    """

    def __init__(self, task: Task, norms: Mapping[str, InputStatistic]) -> None:
        self._task, self._norms, self._method = task, norms, task.method
        if task.method.statistic not in (None, InputNorm):  # which would take longer than all the rest
            self._method = Wanda()
        self._dense: dict[str, Tensor] = {}
        self._now: dict[str, Pattern] = {}  # what is in place

    def __enter__(self) -> "Trials":
        self._dense = {linear.name: linear.weight_OI.clone() for linear in self._task.linears}
        return self

    def __exit__(self, *exc: object) -> None:
        for linear in self._task.linears:
            linear.weight_OI.copy_(self._dense[linear.name])
        torch.clear_autocast_cache()

    def pruned(self, name: str, pattern: Pattern) -> Tensor:
        """Return the pruned weight (O, I) of a linear."""
        return self._prune(self._dense[name], self._norms[name], pattern)

    def _prune(self, dense_OI: Tensor, norms: InputStatistic, pattern: Pattern) -> Tensor:
        weight_OI = dense_OI.clone()
        (self._method if norms.tokens else MagnitudeInRows()).prune(weight_OI, norms, pattern)
        return weight_OI

    def lost(self, linears: Sequence[PrunableLinear], pattern: Pattern) -> float:
        """Estimate the energy that the outputs of linears lose, ||(W - W') X||^2, from the norms of their inputs.

        Args:
            linears: The linears.
            pattern: What they are pruned to.

        Returns:
            The energy, of evenly spaced rows of large matrices.
        """
        energy = 0.0
        for linear in linears:
            norms, dense_OI = self._norms[linear.name], self._dense[linear.name]
            some_OI = dense_OI[:: max(1, len(dense_OI) // ROWS)]
            energy += float(norms.output_energy(some_OI - self._prune(some_OI, norms, pattern)).sum())
        return energy

    def loss(self, patterns: Mapping[str, Pattern], batches: Sequence[Batch]) -> float:
        """Prune, and return the mean cross-entropy of next tokens over the batches of all processes.

        Args:
            patterns: By the name of the linear.
            batches: Of this process.

        Returns:
            Nats per token; infinite where the model overflows.
        """
        for linear in self._task.linears:
            if self._now.get(linear.name) != patterns[linear.name]:
                linear.weight_OI.copy_(self.pruned(linear.name, patterns[linear.name]))
        self._now = dict(patterns)
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        with self._task.team.together(), torch.no_grad():
            torch.clear_autocast_cache()  # it holds copies of the weights in half precision, as they were
            for losses_N in token_losses(self._task.model, batches):
                sums += torch.tensor([float(losses_N.sum()), len(losses_N)], dtype=torch.float64, device="cpu")
        mean = self._mean(sums)[0]
        return mean if math.isfinite(mean) else math.inf

    def slopes(
        self, less: Mapping[str, Pattern], more: Mapping[str, Pattern], batches: Sequence[Batch]
    ) -> dict[str, float]:
        """Attribute to every linear its part in what the loss grows by, if all of them are pruned more.

        Along the straight line between two sets of weights a quadratic loss grows by its gradient in the middle, times
        their difference. One backward pass there gives the part of every linear: Aumann and Shapley's shares of a
        joint cost, by the midpoint rule.

        Args:
            less: What the linears are pruned to at the beginning of the line, by name.
            more: What they are pruned to at its end.
            batches: Of this process.

        Returns:
            The parts, in nats per token, by name.

        Raises:
            ValueError: If the gradients are not finite.
        """
        steps: dict[str, Tensor] = {}
        linears, self._now = self._task.linears, {}
        for linear in linears:
            before_OI = self.pruned(linear.name, less[linear.name])
            after_OI = self.pruned(linear.name, more[linear.name])
            linear.weight_OI.copy_((before_OI + after_OI) / 2)
            steps[linear.name] = after_OI - before_OI
        weights = list(dict.fromkeys(linear.weight for linear in linears))
        sums = torch.zeros(len(linears) + 1, dtype=torch.float64, device="cpu")
        with self._task.team.together(), torch.enable_grad(), only_requiring_grad(self._task.model, weights):
            torch.clear_autocast_cache()
            for losses_N in token_losses(self._task.model, batches):
                # Not backward: the hooks of those who train the model are not for these gradients.
                found = torch.autograd.grad(losses_N.sum(), weights, allow_unused=True)
                gradients = dict(zip(weights, found, strict=True))
                parts = [_inner(linear, gradients[linear.weight], steps[linear.name]) for linear in linears]
                sums += torch.tensor([*parts, len(losses_N)], dtype=torch.float64, device="cpu")
        parts = self._mean(sums)
        if not all(map(math.isfinite, parts)):
            raise ValueError(f"the gradients of the pruned model are NaN or infinite: {OVERFLOW}")
        return dict(zip(steps, parts, strict=True))

    def _mean(self, sums: Tensor) -> list[float]:
        """Divide sums over the tokens of all processes by the number of these tokens, which is the last of the sums."""
        sums = sums.to(self._task.linears[0].weight.device, torch.float32)
        self._task.team.sum([sums])
        *totals, tokens = sums.tolist()
        if not tokens:
            raise ValueError(NOTHING_PREDICTED)
        return [total / tokens for total in totals]


def _inner(linear: PrunableLinear, gradient: Tensor | None, step_OI: Tensor) -> float:
    return 0.0 if gradient is None else float((linear.view(gradient).float() * step_OI.float()).sum())
