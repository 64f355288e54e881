"""Gathering statistics of what enters a layer's linears and experts, while the layer runs.

Shapes: B batch, T tokens, I in features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from wanda_lightning.model.convolutions import convolution_patches
from wanda_lightning.model.experts import expert_inputs
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.statistics import InputStatistic


class _AllInputsSeenError(Exception):
    """The last linear of a layer has its input: its product and what follows are not needed."""


class Collector:
    """Forward hooks that feed what enters linears to their statistics.

    Args:
        statistic: The kind of statistic.
        linears: Those of one layer.
    """

    def __init__(self, statistic: type[InputStatistic], linears: list[PrunableLinear]) -> None:
        self._new = statistic
        self._linears = linears
        self._statistics: dict[str, InputStatistic] = {}
        self._owners: set[str] = set()  # linears that feed their statistic; the others share one of these
        self._fused: dict[nn.Module, list[PrunableLinear]] = {}
        for linear in linears:
            if linear.expert is not None:
                self._fused.setdefault(linear.module, []).append(linear)
        self._single = [linear for linear in linears if linear.expert is None]
        # A layer may be cut short after its last linear, if it calls each exactly once: so it did before with inputs
        # of this shape, and no router decides which it calls.
        self._modules = {linear.module for linear in linears}
        self._is_static = all(linear.experts is None for linear in self._single)
        self._once_each: set[tuple[int, ...]] = set()
        self._calls: list[nn.Module] = []  # in this batch
        self._inputs: list[tuple[Tensor, str]] = []  # seen in this batch, kept alive so that `is` holds
        self._mask_BT: Tensor | None = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> "Collector":
        def hook(see: Callable[..., None], of: Any) -> Callable[..., None]:
            return lambda module, args: see(of, *args)

        self._hooks = [linear.module.register_forward_pre_hook(hook(self._see, linear)) for linear in self._single]
        self._hooks += [module.register_forward_pre_hook(hook(self._see_experts, module)) for module in self._fused]
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def batch(self, shape: tuple[int, ...], mask_BT: Tensor | None) -> Iterator[None]:
        """Bracket one forward pass of the layer.

        Args:
            shape: Of the hidden states that enter it.
            mask_BT: Which tokens are real; None where all are.
        """
        self._shape, self._mask_BT = shape, mask_BT
        self._calls.clear()
        with suppress(_AllInputsSeenError):
            yield
        self._inputs.clear()
        if self._is_static and len(self._calls) == len(self._modules) == len(set(self._calls)):
            self._once_each.add(shape)

    def statistics(self) -> dict[str, InputStatistic]:
        """Return the statistics by name, in the order of the linears whatever the order of calls.

        An expert that saw no token has an empty one.

        Raises:
            ValueError: If a linear was never called, though no router could have passed it by.
        """
        unseen = [linear for linear in self._linears if linear.name not in self._statistics]
        if never := [linear.name for linear in unseen if linear.experts is None]:
            raise ValueError(
                f"the model does not call {_few(never)} on token ids alone, as cross-attention is not called without "
                "an encoder: leave them out with ignore"
            )
        called = {linear.experts for linear in self._linears if linear.name in self._statistics}
        if missed := [linear.name for linear in unseen if linear.experts not in called]:
            raise ValueError(
                f"no calibration token reached {_few(missed)}: use more samples, or leave them out with ignore"
            )
        for linear in unseen:
            self._statistics[linear.name] = self._new(linear.weight_OI.shape[1], linear.weight.device)
        return {linear.name: self._statistics[linear.name] for linear in self._linears}

    def _see(self, linear: PrunableLinear, x: Tensor) -> None:
        name = linear.name
        x = convolution_patches(linear.module, x) if isinstance(linear.module, nn.Conv2d) else x
        if name not in self._statistics:
            sharing = None
            if linear.experts is None:  # which experts share an input may differ by batch and by process
                sharing = next((owner for seen, owner in self._inputs if seen is x), None)
            if sharing is None:
                self._owners.add(name)
            self._statistics[name] = self._statistics[sharing] if sharing else self._new(x.shape[-1], x.device)
        if name in self._owners:
            if linear.experts is None:
                self._inputs.append((x, name))
            self._statistics[name].update(_real_tokens(x, self._mask_BT, linear))
        self._called(linear.module)

    def _see_experts(self, module: nn.Module, hidden: Tensor, top_k_index: Tensor, *_: Any) -> None:
        linears = self._fused[module]
        for linear in linears:
            if linear.name not in self._statistics:
                self._statistics[linear.name] = self._new(linear.weight_OI.shape[1], linear.weight.device)
        for linear, x_TI in expert_inputs(linears, hidden, top_k_index, self._mask_BT):
            self._statistics[linear.name].update(x_TI)
        self._called(module)

    def _called(self, module: nn.Module) -> None:
        self._calls.append(module)
        if self._shape in self._once_each and len(set(self._calls)) == len(self._modules):
            raise _AllInputsSeenError


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


def _real_tokens(x: Tensor, mask_BT: Tensor | None, linear: PrunableLinear) -> Tensor:
    """Drop the padding from a linear's inputs, shape (B, T, I) or flattened (B * T, I)."""
    if mask_BT is None:
        return x
    if x.shape[:-1].numel() != mask_BT.numel() or isinstance(linear.module, nn.Conv2d):
        raise ValueError(
            f"{linear.name} has {x.shape[:-1].numel()} inputs for {mask_BT.numel()} tokens, and which of them are "
            "padding cannot be told: calibrate without padding, on sequences of equal length"
        )
    return x.reshape(-1, x.shape[-1])[mask_BT.reshape(-1).to(x.device)]
