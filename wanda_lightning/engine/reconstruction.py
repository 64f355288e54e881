"""Training what a pruning has kept of a decoder layer, so that it gives what the dense layer gives in the dense model.

Shin et al. 2024 (arXiv:2406.15524) and EBFT (Guo et al. 2024, arXiv:2402.12419): the layer is fed what the pruned
layers before it give, and its target is what comes out of the dense layer when nothing before it was pruned either.

Shapes: B batch, T tokens, D hidden size, O out features, I in features.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanda_lightning.arguments import plain_fields, positive_number, positive_up_to, whole_number
from wanda_lightning.calibration.batches import held_out_batches
from wanda_lightning.calibration.calibrated_layer import OVERFLOW, CalibratedLayer
from wanda_lightning.calibration.free_memory import free_memory
from wanda_lightning.engine.processes import Processes
from wanda_lightning.model.gradients import only_requiring_grad
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.recomputing import bytes_for_gradients, recomputing
from wanda_lightning.report.layer_reconstruction import LayerReconstruction
from wanda_lightning.report.tables import in_bytes

log = logging.getLogger(__name__)

LOSS_SCALE = 2.0**10
"""Keeps gradients in half precision above its smallest number; Adam divides it out again."""


@dataclass(frozen=True)
class Reconstruction:
    """How what is kept of a layer is trained: by Adam, with a learning rate that falls linearly to 0.

    Args:
        epochs: Passes over the calibration batches, at least 1. Fewer are made where the held-out error rises.
        lr: The learning rate of the first step, above 0.
        held_out: Share of the batches that is not trained on, in (0, 0.5]; for 1/8 every eighth, at least one.

    Raises:
        ValueError: If a setting is out of range.
    """

    epochs: int = 3
    lr: float = 2e-4
    held_out: float = 0.125

    def __post_init__(self) -> None:
        plain_fields(self)
        whole_number("epochs", self.epochs, 1)
        positive_number("lr", self.lr)
        positive_up_to("held_out", self.held_out, 0.5)

    def split(self, batches: int) -> tuple[list[int], list[int]]:
        """Say which of so many batches are trained on, and which are held out.

        Args:
            batches: How many there are.

        Returns:
            The numbers of both.

        Raises:
            ValueError: If there are too few for both.
        """
        held_out = held_out_batches(batches, self.held_out, str(self))
        return [batch for batch in range(batches) if batch not in held_out], [*held_out]


def reconstruct(
    inputs: CalibratedLayer, masks: Mapping[str, Tensor], settings: Reconstruction, processes: Processes
) -> LayerReconstruction | None:
    """Train the kept weights of a layer's pruned linears in place; pruned ones stay zero.

    Args:
        inputs: The layer, pruned, with what enters it in the pruned model and what it gives in the dense one.
        masks: What was kept of each linear, by name: booleans (O, I).
        settings: How it is trained.
        processes: Those that have the other parts of the calibration set; all of them end with the same weights.

    Returns:
        The errors on the batches that were held out; None for a layer without pruned linears.

    Raises:
        ValueError: If the layer's outputs are NaN or infinite there.
    """
    if not inputs.layer.linears:
        return None
    started = time.perf_counter()
    train, held_out = settings.split(len(inputs.hidden_BTD))
    fit = _Fit(inputs, masks, processes)
    steps = max(processes.gather(len(train)))
    optimizer = torch.optim.Adam(fit.masters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps * settings.epochs)
    before = least = fit.error(held_out)
    if not math.isfinite(before):
        raise ValueError(f"the hidden states behind {inputs.layer.name} are NaN or infinite: {OVERFLOW}")
    best, epochs = fit.copy(), 0
    try:
        with only_requiring_grad(inputs.layer.module, fit.weights), fit.saving_memory():
            for epoch in range(settings.epochs if before else 0):
                for step in range(steps):
                    fit.set_gradients(train[step] if step < len(train) else None, before)
                    with torch.device("cpu"):  # torch 2.11 counts the steps on the default device
                        optimizer.step()
                    schedule.step()
                    fit.put_in_place(fit.masters)
                if not (error := fit.error(held_out)) < least:
                    break
                best, least, epochs = fit.copy(), error, epoch + 1
    finally:
        fit.put_in_place(best)
    fit.send(0)
    return LayerReconstruction(before, least, epochs, time.perf_counter() - started)


class _Fit:
    """The kept weights of a layer, with a copy in single precision of those that are stored in half."""

    def __init__(self, inputs: CalibratedLayer, masks: Mapping[str, Tensor], processes: Processes) -> None:
        assert inputs.dense_BTD is not None, "the walk was to take the hidden states of the dense model along"
        self._inputs, self._dense_BTD, self._processes = inputs, inputs.dense_BTD, processes
        self._kept = _by_parameter(inputs.layer.linears, masks)
        self.weights = [*self._kept]
        self.masters = [w.detach().float() if w.itemsize < 4 else w.detach() for w in self.weights]

    @contextmanager
    def saving_memory(self) -> Iterator[None]:
        """Let the parts of the layer be computed twice where what they keep for gradients does not fit."""
        layer, shapes = self._inputs.layer, self._inputs.hidden_BTD.shapes
        device, largest = self.weights[0].device, max(range(len(shapes)), key=lambda batch: shapes[batch].numel())
        with self._processes.together(), torch.enable_grad():
            kept = bytes_for_gradients(layer.module, lambda: self._inputs.output(largest))
        free = free_memory(device)
        if free is None or 2 * kept < free:  # the other half is for the gradients themselves
            yield
            return
        log.info(
            "%s keeps up to %s for gradients, and %s are free on %s: its parts are computed twice",
            layer.name,
            in_bytes(kept),
            in_bytes(free),
            device,
        )
        with recomputing(layer.module):
            yield

    def copy(self) -> list[Tensor]:
        """Return copies of the weights as they are stored."""
        return [weight.detach().clone() for weight in self.weights]

    def put_in_place(self, values: Sequence[Tensor]) -> None:
        """Let the layer compute with these."""
        for weight, value in zip(self.weights, values, strict=True):
            weight.detach().copy_(value)
        torch.clear_autocast_cache()

    def send(self, source: int) -> None:
        """Take the weights of one process, should a sum have been rounded otherwise there."""
        self.put_in_place([self._processes.send(source, weight.detach()) for weight in self.weights])

    def error(self, batches: Sequence[int]) -> float:
        """Return the mean error of the real tokens of some batches, over all processes."""
        sums = torch.zeros(2, dtype=torch.float32, device=self.weights[0].device)
        with self._processes.together():
            for batch in batches:
                error_N = self._errors(batch)
                sums += torch.stack([error_N.sum(), error_N.new_tensor(len(error_N))]).to(sums)
        self._processes.sum([sums])
        total, tokens = self._processes.send(0, sums).tolist()
        return total / max(1.0, tokens)

    def set_gradients(self, batch: int | None, unit: float) -> None:
        """Give each master the gradient of the mean error over a batch of every process, in a unit near the error."""
        gradients = [torch.zeros_like(master) for master in self.masters]
        tokens = torch.zeros(1, dtype=torch.float32, device=self.weights[0].device)
        with self._processes.together():
            if batch is not None:
                tokens += self._backward(batch, unit, gradients)
        if self._processes.size > 1:
            share = tokens.clone()
            self._processes.sum([tokens])
            share /= tokens.clamp_min(1)
            for gradient in gradients:
                gradient *= share
            self._processes.sum(gradients)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient

    def _backward(self, batch: int, unit: float, gradients: list[Tensor]) -> int:
        """Add the gradients of the mean error over one batch; return its number of real tokens."""
        with torch.enable_grad():
            error_N = self._errors(batch)
            loss = error_N.sum() * (LOSS_SCALE / max(1, len(error_N)) / unit)
        if loss.requires_grad:  # else no token reached the experts that were pruned
            found = torch.autograd.grad(loss, self.weights, allow_unused=True)
            for weight, total, gradient in zip(self.weights, gradients, found, strict=True):
                if gradient is not None:
                    total += torch.where(self._kept[weight], gradient, 0)
        return len(error_N)

    def _errors(self, batch: int) -> Tensor:
        """Run the layer; return ||out - dense out||^2 / ||dense out||^2 of every real token of a batch, in float32."""
        out_BTD = self._inputs.output(batch)
        dense_BTD, mask_BT = self._dense_BTD[batch].to(out_BTD.device).float(), self._inputs.real[batch].mask_BT
        error_BT = (out_BTD.float() - dense_BTD).square().sum(-1) / dense_BTD.square().sum(-1).clamp_min(1e-12)
        return error_BT.flatten() if mask_BT is None else error_BT[..., mask_BT.to(error_BT.device)].flatten()


def _by_parameter(linears: Sequence[PrunableLinear], masks: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Lay the masks out as the parameters are: experts share one, and the slices of those that were not pruned stay."""
    kept: dict[nn.Parameter, Tensor] = {}
    for linear in linears:
        whole = kept.setdefault(linear.weight, torch.zeros_like(linear.weight, dtype=torch.bool))
        linear.view(whole).copy_(masks[linear.name])
    return kept
