"""Gathering statistics of what enters a layer's linears and experts, while the layer runs.

Shapes: B batch, T tokens, I in features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

from torch import Tensor, nn

from wanda_lightning.calibration.earlier_calls import NewStatistics
from wanda_lightning.calibration.early_stop import EarlyStop
from wanda_lightning.calibration.real_tokens import RealTokens
from wanda_lightning.calibration.weight_products import WeightProducts
from wanda_lightning.model.attention import projection_inputs
from wanda_lightning.model.convolutions import convolution_patches
from wanda_lightning.model.experts import expert_inputs
from wanda_lightning.model.hooks import before_calls
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.statistics import InputStatistic


def by_module(linears: Sequence[PrunableLinear]) -> dict[nn.Module, list[PrunableLinear]]:
    """Group linears by the module whose call shows their inputs: their own, or that of the fused experts."""
    modules: dict[nn.Module, list[PrunableLinear]] = {}
    for linear in linears:
        modules.setdefault(linear.module, []).append(linear)
    return modules


class Collector:
    """Feeds what enters linears to their statistics.

    Args:
        new: Makes statistics.
        linears: Those of one layer.
        to_the_end: Whether the layer is to give its outputs; else it may be left when all of them were called.
    """

    def __init__(self, new: NewStatistics, linears: Sequence[PrunableLinear], to_the_end: bool = False) -> None:
        self._new = new
        self._linears = linears
        self._statistics: dict[str, InputStatistic] = {}
        self._owners: set[str] = set()  # linears that feed their statistic; the others share one of these
        self._inputs: list[tuple[Tensor, str]] = []  # seen in this batch, kept alive so that `is` holds
        self._real = RealTokens()
        self._modules = by_module(linears)
        routed = any(linear.may_be_passed_by for linear in linears)
        self._stop = EarlyStop(self._modules, works=not (routed or to_the_end))

    @contextmanager
    def batch(self, shape: tuple[int, ...], real: RealTokens) -> Iterator[None]:
        """Bracket one forward pass of the layer.

        Args:
            shape: Shape of the hidden states that enter it.
            real: Which tokens are real.
        """
        self._real = real
        products = WeightProducts(self._modules, lambda module, x: self._called(module, (x,), {}))
        with self._stop.after_the_last_call(shape), before_calls(self._modules, self._called), products:
            yield
        self._inputs.clear()

    def statistics(self, is_last_call: bool = True) -> dict[str, InputStatistic]:
        """Return the statistics by name, in the order of the linears.

        The statistic of an expert that got no tokens is empty.

        Args:
            is_last_call: Whether the layer is not called again. Else a linear that it passed by has an empty statistic.

        Returns:
            The statistics.

        Raises:
            ValueError: If a linear was never called, though no router could have passed it by.
        """
        unseen = [linear for linear in self._linears if linear.name not in self._statistics]
        if is_last_call:
            called = {linear.experts for linear in self._linears if linear.name in self._statistics}
            never = [linear for linear in unseen if not self._new.has_begun(linear)]
            refuse_uncalled([linear.name for linear in never if linear.experts is None])
            refuse_unreached([linear.name for linear in never if linear.experts not in called])
        for linear in unseen:
            self._statistics[linear.name] = self._new.of(linear)
        return {linear.name: self._statistics[linear.name] for linear in self._linears}

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        linears, inputs = self._modules[module], [*args, *kwargs.values()]
        if linears[0].projection is not None:
            projected = projection_inputs(args, kwargs)
            for linear in linears:
                self._see(linear, projected[cast(int, linear.projection)])
        elif linears[0].expert is None:
            self._see(linears[0], inputs[0])
        else:
            self._see_experts(linears, inputs)
        self._stop.called(module)

    def _see(self, linear: PrunableLinear, x: Tensor) -> None:
        name = linear.name
        if name not in self._statistics:
            sharing = None
            if linear.experts is None:  # which experts share an input may differ by batch and by process
                owners = (owner for seen, owner in self._inputs if seen is x and self._new.are_one(name, owner))
                sharing = next(owners, None)
            if sharing is None:
                self._owners.add(name)
            self._statistics[name] = self._statistics[sharing] if sharing else self._new.of(linear)
        elif name not in self._owners and not self._is_shared(name, x):  # called again, with an input of its own
            self._statistics[name] = deepcopy(self._statistics[name])
            self._owners.add(name)
        if name in self._owners:
            if linear.experts is None:
                self._inputs.append((x, name))
            self._statistics[name].update(real_inputs(x, self._real.of(x), linear))

    def _is_shared(self, name: str, x: Tensor) -> bool:
        """Whether the owner of a linear's statistic has counted an input in this batch."""
        return any(seen is x and self._statistics[owner] is self._statistics[name] for seen, owner in self._inputs)

    def _see_experts(self, linears: list[PrunableLinear], inputs: list[Any]) -> None:
        for linear in linears:
            if linear.name not in self._statistics:
                self._statistics[linear.name] = self._new.of(linear)
        for linear, x_TI in expert_inputs(linears, inputs, self._real.mask_BT):
            self._statistics[linear.name].update(x_TI)


def real_inputs(x: Tensor, mask_BT: Tensor | None, linear: PrunableLinear) -> Tensor:
    """Return what a linear sees of the real tokens.

    Args:
        x: What enters its module: (B, T, I), flattened (B * T, I), or images for a convolution.
        mask_BT: Which tokens are real; None where all are.
        linear: The linear.

    Returns:
        Its inputs without those of padding, shape (..., I).

    Raises:
        ValueError: If it cannot be told which inputs are of padding.
    """
    is_convolution = isinstance(linear.module, nn.Conv2d)
    x = convolution_patches(linear.module, x) if isinstance(linear.module, nn.Conv2d) else x
    if mask_BT is None:
        return x
    if x.shape[:-1].numel() != mask_BT.numel() or is_convolution:
        raise ValueError(
            f"{linear.name} has {x.shape[:-1].numel()} inputs for {mask_BT.numel()} tokens, and which of them are "
            "padding cannot be told: calibrate without padding, on sequences of equal length"
        )
    return x.reshape(-1, x.shape[-1])[mask_BT.reshape(-1).to(x.device)]


def refuse_uncalled(names: Sequence[str]) -> None:
    """Refuse linears that the model does not call, whatever the tokens.

    Args:
        names: Such linears.

    Raises:
        ValueError: If there are such.
    """
    if names:
        raise ValueError(
            f"the model does not call {_few(names)} on these batches, as cross-attention is not called without an "
            "encoder, and fused kernels of Mamba take dt_proj's weight without a call: leave them out with ignore"
        )


def refuse_unreached(names: Sequence[str]) -> None:
    """Refuse experts if no token reached any expert of their list.

    Args:
        names: The linears of such experts.

    Raises:
        ValueError: If there are such.
    """
    if names:
        raise ValueError(f"no calibration token reached {_few(names)}: use more samples, or leave them out with ignore")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)
