"""Which neurons of a layer stay, and what becomes of the matrix that reads them; alone or with other processes.

Shapes: O out features, I in features (the neurons), K kept neurons.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wanda_lightning.calibration.calibrated_layer import CalibratedLayer
from wanda_lightning.engine.narrowing import Narrowing
from wanda_lightning.engine.processes import Processes, share_statistics
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.solvers.neurons import fit_to_all_inputs, remove_blocks, remove_inputs
from wanda_lightning.statistics import InputHessian, InputNorm, InputStatistic

NeuronChoice = Literal["obs", "wanda", "magnitude"]


class ReadMatrix(NamedTuple):
    """What a reading matrix became: the neurons that stay (K,), and its relative squared error if it is known."""

    kept_K: Tensor
    error: float | None


class NeuronSolver:
    """Chooses the neurons of a layer; for now the matrix that reads them is zero where they go.

    Args:
        plan: How many stay.
        choice: Which.
        refit: Whether the rest is fitted.
        damping: Of the Hessian.
        processes: Those that have the other parts of the calibration set.

    Attributes:
        statistic: What has to be known of the neurons; None for nothing.
        tokens: How many tokens were seen.
    """

    def __init__(
        self, plan: Narrowing, choice: NeuronChoice, refit: bool, damping: float, processes: Processes
    ) -> None:
        self.plan, self.choice, self.refit, self.damping, self.processes = plan, choice, refit, damping, processes
        by_score: dict[str, type[InputStatistic] | None] = {"obs": InputHessian, "wanda": InputNorm, "magnitude": None}
        self.statistic = InputHessian if refit else by_score[choice]
        self.tokens: int | None = None
        self.groups = {group.reader.name: group for each in plan.neurons.values() for group in each}

    def solve(self, layer: DecoderLayer, inputs: CalibratedLayer | None) -> dict[str, ReadMatrix]:
        """Choose the neurons of a layer, and change the matrices that read them."""
        processes = self.processes
        with processes.together():
            statistics = inputs.collect(self.statistic) if inputs and self.statistic and layer.linears else {}
        owners = share_statistics(statistics, layer.linears, processes)
        self.tokens = max((statistic.tokens for statistic in statistics.values()), default=self.tokens or 0) or None
        weights = {linear.name: linear.weight_OI.clone() for linear in layer.linears}
        masks = {name: torch.zeros(w.shape[1], dtype=torch.uint8, device=w.device) for name, w in weights.items()}
        errors: dict[str, float] = {}
        with processes.together():
            for name, weight_OI in weights.items():
                if owners.get(name, processes.rank) == processes.rank:
                    mask_I, error = self._solve_one(name, weight_OI, statistics.get(name))
                    masks[name].copy_(mask_I)
                    errors |= {name: error} if error is not None else {}
        for name, owner in owners.items():
            weights[name], masks[name] = (processes.send(owner, each) for each in (weights[name], masks[name]))
        for others in processes.gather(errors):
            errors |= others
        for linear in layer.linears:
            linear.weight_OI.copy_(weights[linear.name])
        torch.clear_autocast_cache()
        return {name: ReadMatrix(mask_I.nonzero().flatten(), errors.get(name)) for name, mask_I in masks.items()}

    def _solve_one(self, name: str, weight_OI: Tensor, statistic: InputStatistic | None) -> tuple[Tensor, float | None]:
        """Choose the inputs of a matrix that stay, (I,), and change the matrix in place."""
        block = self.groups[name].block
        width, kept = weight_OI.shape[1], self.plan.kept(self.groups[name])
        if statistic is None or not statistic.tokens:  # none, or of an expert that no token reached
            mask_I = _largest(weight_OI.float().abs().mean(0), kept, block)
            weight_OI[:, ~mask_I] = 0
            return mask_I, None
        dense_OI = weight_OI.clone()
        try:
            if isinstance(statistic, InputHessian) and self.choice == "obs":
                factor, number = statistic.factor(self.damping), (width - kept) // block
                mask_I = (
                    remove_inputs(weight_OI, factor, number)
                    if block == 1
                    else remove_blocks(weight_OI, factor, number, block)
                )
            else:
                norm = statistic.norm() if isinstance(statistic, InputHessian) else statistic
                norm_I = norm.compute() if self.choice == "wanda" else 1
                mask_I = _largest(weight_OI.float().abs().mean(0) * norm_I, kept, block)
            weight_OI[:, ~mask_I] = 0
            if isinstance(statistic, InputHessian) and self.refit:
                weight_OI[:, mask_I] = fit_to_all_inputs(dense_OI, mask_I, statistic.compute(), self.damping).to(
                    weight_OI.dtype
                )
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"the neurons that {name} reads cannot be chosen: {error}") from error
        lost = statistic.output_energy(dense_OI - weight_OI).sum()
        whole = statistic.output_energy(dense_OI).sum().clamp_min(torch.finfo(lost.dtype).tiny)
        return mask_I, float(lost / whole)


def _largest(score_I: Tensor, number: int, block: int) -> Tensor:
    """Mark the inputs with the largest scores, or the blocks of inputs with the largest sums; ties go by position."""
    sum_B = score_I.unflatten(0, (-1, block)).sum(1)
    order_B = sum_B.sort(descending=True, stable=True).indices
    mask_B = torch.zeros_like(sum_B, dtype=torch.bool).index_fill_(0, order_B[: number // block], 1)
    return mask_B.repeat_interleave(block)
