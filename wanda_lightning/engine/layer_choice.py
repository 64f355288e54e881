"""Which decoder layers go: by how they turn the hidden states, or by the loss without them.

Shapes: B batch, T tokens, D hidden size, N real tokens.
"""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from wanda_lightning.calibration.batches import Batch, model_inputs
from wanda_lightning.calibration.calibrated_layer import OVERFLOW, CalibratedLayer
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.calibration.token_losses import NOTHING_PREDICTED, predicts_tokens, token_losses
from wanda_lightning.calibration.walk import walk
from wanda_lightning.engine.loop import Progress
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.shortening import Shortening
from wanda_lightning.engine.trial_run import why_it_fails
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.precision import longest_float

NAN = f"what the layers are chosen by is NaN: {OVERFLOW}"


class LayerChooser:
    """Chooses layers.

    Args:
        plan: A model, its layers, and which of them may go.
        number: How many are to go.
        processes: Those that have the other parts of the calibration set.
        progress: Shows how far it is.

    Attributes:
        tokens: How many calibration tokens were seen.
    """

    def __init__(self, plan: Shortening, number: int, processes: Processes, progress: Progress) -> None:
        self.plan, self.model, self.number = plan, plan.model, number
        self.processes, self.progress = processes, progress
        self.tokens: int | None = None
        self._runs = not why_it_fails(self.model)  # what fails with all layers, too, is not for want of some

    def by_angle(
        self, calibration: Iterable[Batch], activations: Place, contiguous: bool
    ) -> tuple[set[int], dict[int, float]]:
        """Choose by how layers turn the hidden states: one layer at a time, or a run of them by its first."""
        run = self.number if contiguous else 1
        if not run:
            return set(), {}
        decoder = [DecoderLayer(layer.name, layer.module, [], {}) for layer in self.plan.layers]
        steps = walk(self.model, decoder, calibration, activations)
        entered: deque[list[Tensor]] = deque(maxlen=run)
        figures: dict[int, float] = {}
        for index, step in enumerate(self.progress(self.processes.first_together(steps), len(decoder))):
            entered.append([hidden.cpu() if activations != "device" else hidden for hidden in step.hidden_BTD])
            step.advance()
            if len(entered) == run:
                figures[index + 1 - run] = turned = self._mean(_turned(entered[0], step, as_angle=contiguous))
                if math.isnan(turned):
                    raise ValueError(NAN)
        if contiguous:
            return self._run_of([set(range(start, start + run)) for start in _ascending(figures)]), figures
        gone: set[int] = set()
        while len(gone) < self.number:  # beside a layer that went, one may go that could not alone
            left = [layer for layer in _ascending(figures) if layer not in gone]
            layer = next((each for each in left if not self._why_not({*gone, each})), None)
            if layer is None:
                self._refuse(gone, left)
            gone.add(layer)
        return gone, figures

    def by_loss(self, calibration: Iterable[Batch]) -> tuple[set[int], dict[int, float]]:
        """Choose one by one the layer without which the loss is smallest."""
        if not predicts_tokens(self.model):
            raise ValueError(
                f"choice 'loss' goes by how well next tokens are predicted, and {type(self.model).__name__} predicts "
                "none: choose by 'influence' or 'contiguous'"
            )
        with self.processes.together():
            batches = [model_inputs(batch, self.model) for batch in calibration]
            if not batches:
                raise ValueError("the calibration set is empty: at least one batch is needed")
        gone: set[int] = set()
        figures: dict[int, float] = {}
        layers = len(self.plan.layers)
        rounds = [(n, layer) for n in range(self.number) for layer in range(layers - n)]
        shown = iter(self.progress(rounds, len(rounds)))
        for _ in range(self.number):
            losses: dict[int, float] = {}
            left = [layer for layer in range(layers) if layer not in gone]
            may_go = [layer for layer in left if not self._why_not({*gone, layer})]
            if not may_go:
                self._refuse(gone, left)
            for layer in left:
                next(shown)
                if layer in may_go:
                    with self.plan.without({*gone, layer}):
                        losses[layer] = self._mean(token_losses(self.model, batches))
            finite = {layer: loss for layer, loss in losses.items() if not math.isnan(loss)}
            # Half precision may overflow without a layer that the others need, which then stays.
            if not finite or (len(finite) < len(losses) and math.isnan(self._mean(token_losses(self.model, batches)))):
                raise ValueError(NAN)
            figures |= finite
            gone.add(_ascending(finite)[0])
        for _ in shown:
            pass
        return gone, figures

    def _mean(self, values: Iterator[Tensor]) -> float:
        """Average values (N,) over all batches of all processes."""
        sums = [(float(each.sum(dtype=longest_float(each.device))), each.numel()) for each in values]
        total = torch.tensor(sums, dtype=torch.float64, device="cpu").sum(0)
        device = next(self.model.parameters()).device
        total = total.to(device) if device.type == "cuda" else total
        self.processes.sum([total])
        self.tokens = int(total[1])
        if not self.tokens:
            raise ValueError(NOTHING_PREDICTED)
        return float(total[0] / total[1])

    def _why_not(self, gone: Collection[int]) -> str:
        """Say why the model without some layers could not be loaded again as it is, or not run; empty if it could."""
        names = ", ".join(self.plan.layers[number].name for number in sorted(gone))
        try:
            with self.plan.without(gone):
                failure = why_it_fails(self.model) if self._runs else ""
        except ValueError as error:
            return f"without {names} {error}"
        return f"without {names} the model does not run: {failure}" if failure else ""

    def _run_of(self, runs: Sequence[set[int]]) -> set[int]:
        """Take the first run of layers that may go."""
        for gone in runs:
            if not self._why_not(gone):
                return gone
        raise ValueError(f"no {self.number} layers in a row can go: {self._why_not(runs[0])}")

    def _refuse(self, gone: set[int], others: Sequence[int]) -> NoReturn:
        """Say why none of the others can go beside some layers: why the first cannot."""
        why = self._why_not({*gone, others[0]})
        raise ValueError(f"only {len(gone)} layers can go, {self.number} are asked for: {why}")


def _ascending(figures: dict[int, float]) -> list[int]:
    return sorted(figures, key=figures.__getitem__)


def _turned(entered: Sequence[Tensor], step: CalibratedLayer, as_angle: bool) -> Iterator[Tensor]:
    """Yield for each batch how far hidden states are turned, (N,): 1 - cosine, or the angle as a fraction of pi."""
    for before_BTD, after_BTD, real in zip(entered, step.hidden_BTD, step.real, strict=True):
        cosine_BT = F.cosine_similarity(before_BTD.to(after_BTD.device).float(), after_BTD.float(), dim=-1)
        cosine_N = cosine_BT.flatten() if real.mask_BT is None else cosine_BT[real.mask_BT.to(cosine_BT.device)]
        yield cosine_N.clamp(-1, 1).acos() / torch.pi if as_angle else 1 - cosine_N
