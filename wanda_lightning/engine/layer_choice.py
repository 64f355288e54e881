"""Which decoder layers go: by how they turn the hidden states, or by the loss without them.

Shapes: B batch, T tokens, D hidden size, N real tokens.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Batch, model_inputs
from wanda_lightning.calibration.calibrated_layer import OVERFLOW, CalibratedLayer
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.calibration.token_losses import NOTHING_PREDICTED, token_losses
from wanda_lightning.calibration.walk import walk
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.pruner import Progress
from wanda_lightning.engine.shortening import Shortening
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.offload import device_of
from wanda_lightning.model.replaced import replaced
from wanda_lightning.precision import longest_float


class LayerChooser:
    """Chooses layers.

    Args:
        model: The model.
        plan: Its layers, and which of them may go.
        number: How many are to go.
        processes: Those that have the other parts of the calibration set.
        progress: Shows how far it is.

    Attributes:
        tokens: How many calibration tokens were seen.
    """

    def __init__(
        self, model: nn.Module, plan: Shortening, number: int, processes: Processes, progress: Progress
    ) -> None:
        self.model, self.plan, self.number, self.processes, self.progress = model, plan, number, processes, progress
        self.tokens: int | None = None

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
                figures[index + 1 - run] = self._mean(_turned(entered[0], step, as_angle=contiguous))
        if contiguous:
            return self._first_that_may([set(range(start, start + run)) for start in _ascending(figures)]), figures
        return self._collect(_ascending(figures)), figures

    def by_loss(self, calibration: Iterable[Batch]) -> tuple[set[int], dict[int, float]]:
        """Choose one by one the layer without which the loss is smallest."""
        with self.processes.together():
            batches = [model_inputs(batch, self.model) for batch in calibration]
            if not batches:
                raise ValueError("the calibration set is empty: at least one batch of input_ids is needed")
        gone: set[int] = set()
        figures: dict[int, float] = {}
        modules = [layer.module for layer in self.plan.layers]
        stand_in = _stand_ins(self.model, modules, batches[0])
        rounds = [(n, layer) for n in range(self.number) for layer in range(len(modules) - n)]
        shown = iter(self.progress(rounds, len(rounds)))
        for _ in range(self.number):
            losses: dict[int, float] = {}
            left = [layer for layer in range(len(modules)) if layer not in gone]
            may_go = [layer for layer in left if not self.plan.why_not(self.model, {*gone, layer})]
            if not may_go:
                self._first_that_may([{*gone, layer} for layer in left])  # which says why
            for layer in left:
                next(shown)
                if layer not in may_go:
                    continue
                with ExitStack() as stack:
                    for each in (*gone, layer):
                        stack.enter_context(replaced(modules[each], "forward", stand_in[each]))
                    losses[layer] = self._mean(token_losses(self.model, batches))
            figures |= losses
            gone = self._first_that_may([{*gone, layer} for layer in _ascending(losses)])
        for _ in shown:
            pass
        return gone, figures

    def _mean(self, values: Iterator[Tensor]) -> float:
        """Average values (N,) over all batches of all processes."""
        sums = [(float(each.sum(dtype=longest_float(each.device))), each.numel()) for each in values]
        total = torch.tensor(sums, dtype=torch.float64).sum(0)
        device = next(self.model.parameters()).device
        total = total.to(device) if device.type == "cuda" else total
        self.processes.sum([total])
        self.tokens = int(total[1])
        if not self.tokens:
            raise ValueError(NOTHING_PREDICTED)
        mean = float(total[0] / total[1])
        if math.isnan(mean):
            raise ValueError(f"what the layers are chosen by is NaN: {OVERFLOW}")
        return mean

    def _collect(self, ascending: Sequence[int]) -> set[int]:
        """Take the first layers that may go together."""
        gone: set[int] = set()
        for layer in ascending:
            if len(gone) < self.number and not self.plan.why_not(self.model, {*gone, layer}):
                gone.add(layer)
        if len(gone) < self.number:
            why = next(filter(None, (self.plan.why_not(self.model, {*gone, x}) for x in ascending if x not in gone)))
            raise ValueError(f"only {len(gone)} layers can go, {self.number} are asked for: {why}")
        return gone

    def _first_that_may(self, sets: Sequence[set[int]]) -> set[int]:
        """Take the first set of layers that may go."""
        for gone in sets:
            if not self.plan.why_not(self.model, gone):
                return gone
        raise ValueError(f"{len(sets[0])} layers cannot go together: {self.plan.why_not(self.model, sets[0])}")


def _ascending(figures: dict[int, float]) -> list[int]:
    return sorted(figures, key=figures.__getitem__)


def _turned(entered: Sequence[Tensor], step: CalibratedLayer, as_angle: bool) -> Iterator[Tensor]:
    """Yield for each batch how far hidden states are turned, (N,): 1 - cosine, or the angle as a fraction of pi."""
    for before_BTD, after_BTD, real in zip(entered, step.hidden_BTD, step.real, strict=True):
        cosine_BT = F.cosine_similarity(before_BTD.to(after_BTD.device).float(), after_BTD.float(), dim=-1)
        cosine_N = cosine_BT.flatten() if real.mask_BT is None else cosine_BT[real.mask_BT.to(cosine_BT.device)]
        yield cosine_N.clamp(-1, 1).acos() / torch.pi if as_angle else 1 - cosine_N


def _stand_ins(model: nn.Module, modules: Sequence[nn.Module], batch: dict[str, Tensor]) -> list[Callable[..., Any]]:
    """Return for each layer a forward that passes hidden states on, beside all else that the layer gives."""
    given: dict[nn.Module, Any] = {}
    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_hook(lambda module, _, out: given.update({module: out}))
            hooks.callback(handle.remove)
        device = device_of(cast(Any, model).get_input_embeddings())
        model(**{name: tensor[:1].to(device) for name, tensor in batch.items()}, use_cache=False)

    def stand_in(out: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_BTD = args[0] if args else kwargs["hidden_states"]
            return type(out)((hidden_BTD, *out[1:])) if isinstance(out, tuple | list) else hidden_BTD

        return forward

    return [stand_in(given[module]) for module in modules]
