"""What enters the linears of a layer in the dense model, kept until the pruned layer has come as far.

Shapes: B batch, T tokens, I in features, D hidden size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.hidden_states import HiddenStates, Place
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.hooks import before_calls


class DenseInputs:
    """What enters the linears of a layer and what is in the residual stream there, batch by batch.

    Linears of experts are left out: a router may send other tokens to them in the pruned model.

    Args:
        layer: The layer, dense still.
        place: Where all of it waits.

    Attributes:
        readers: For each module whose output is added to the residual stream, the one that reads the stream it is added
            to; None where that is the layer itself.
    """

    def __init__(self, layer: DecoderLayer, place: Place) -> None:
        self._layer, self._place = layer, place
        self._modules = {each.module for each in layer.linears if each.experts is None and each.projection is None}
        self._kept: dict[nn.Module | None, HiddenStates] = {}
        self.readers: dict[nn.Module, nn.Module | None] | None = None

    def record(self, hidden_BTD: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Run the layer on the next batch, and keep what its linears see.

        Args:
            hidden_BTD: What enters the layer.
            run: Runs it on that.

        Returns:
            What the layer gives.
        """
        if self.readers is None:
            self.readers, inputs, out_BTD = residual_writers(self._layer.module, self._modules, hidden_BTD, run)
            keep, wanted = self._keep_once(), self._wanted
            for module, x in inputs:
                if module in wanted:
                    keep(module, x)
        else:
            with _first_inputs(self._wanted, self._keep_once()):
                out_BTD = run()
        if None in self.readers.values():
            self._keep(None, hidden_BTD)
        return out_BTD

    @property
    def _wanted(self) -> set[nn.Module]:
        """The modules whose inputs are kept."""
        return self._modules | {module for module in (self.readers or {}).values() if module is not None}

    def _keep_once(self) -> Callable[[nn.Module, Tensor], None]:
        """Return what keeps the inputs of a batch, those that several modules have once."""
        seen: list[tuple[nn.Module, Tensor]] = []

        def look(module: nn.Module, x: Tensor) -> None:
            if first := next((other for other, tensor in seen if tensor is x), None):  # q, k and v share theirs
                assert self.readers is not None
                self.readers.pop(first, None)  # the sums of a writer serve it alone
                return
            seen.append((module, x))
            self._keep(module, x)

        return look

    def _keep(self, module: nn.Module | None, x: Tensor) -> None:
        self._kept.setdefault(module, HiddenStates(self._place)).append(x)

    def of(self, module: nn.Module | None, batch: int) -> Tensor | None:
        """Return what entered a module in a batch, or the layer; None where that was not kept."""
        kept = self._kept.get(module)
        return kept[batch] if kept is not None and batch < len(kept) else None

    def reorder(self, module: nn.Module, order_I: Tensor) -> None:
        """Let the inputs of a module stand in another order, as the columns of its weight do."""
        kept = self._kept.get(module, HiddenStates())
        for batch, x in enumerate(kept):
            kept[batch] = x[..., order_I.to(x.device)]

    def drop(self) -> None:
        """Let go of all that is kept."""
        self._kept.clear()


def residual_writers(
    layer: nn.Module, modules: set[nn.Module], hidden_BTD: Tensor, run: Callable[[], Tensor]
) -> tuple[dict[nn.Module, nn.Module | None], list[tuple[nn.Module, Tensor]], Tensor]:
    """Find the modules whose output is added to the residual stream: the sum is, bit by bit, what is read next.

    A layer that adds several outputs at once, or scales or norms them first, has none.

    Args:
        layer: The decoder layer.
        modules: Those of its modules that are looked at.
        hidden_BTD: What enters the layer: the stream as it is first.
        run: Runs the layer on that.

    Returns:
        For each of them, the module that reads the stream it is added to, None for the layer itself; what enters the
        modules of the layer, in the order of the calls; and what the layer gives.
    """
    found: dict[nn.Module, nn.Module | None] = {}
    inputs: list[tuple[nn.Module, Tensor]] = []
    stream_BTD, reader = hidden_BTD.clone(), None
    outputs: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module | None, x: Tensor) -> None:
        nonlocal stream_BTD, reader
        if module is not None:
            inputs.append((module, x))
        for writer, out_BTD in outputs.items():
            if is_as_large(x) and torch.equal(x.reshape(out_BTD.shape), stream_BTD.to(x.device) + out_BTD.to(x.device)):
                found[writer] = reader
                stream_BTD, reader = x.reshape(out_BTD.shape).clone(), module
                outputs.clear()
                break

    def wrote(module: nn.Module, _: Any, out: Any) -> None:
        if is_as_large(out):
            outputs[module] = out.reshape(stream_BTD.shape).clone()  # some models add to it in place

    def is_as_large(x: Tensor) -> bool:  # OPT's second half sees the stream as (B * T, D)
        return x.numel() == stream_BTD.numel() and x.shape[-1:] == stream_BTD.shape[-1:]

    with ExitStack() as hooks, _first_inputs({*layer.modules()} - {layer}, look):
        for module in modules:
            hooks.callback(module.register_forward_hook(wrote).remove)
        look(None, out_BTD := run())
    return found, inputs, out_BTD


def _first_inputs(modules: set[nn.Module], look: Callable[[nn.Module, Tensor], None]) -> AbstractContextManager[None]:
    """Show the first argument of every call of some modules, where it is a tensor."""

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(x := next(iter([*args, *kwargs.values()]), None), Tensor):
            look(module, x)

    return before_calls(modules, called)
