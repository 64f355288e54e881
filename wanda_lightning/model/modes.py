"""How a model runs for a while: in eval mode, uncompiled, in its own precision."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from wanda_lightning.model.replaced import replaced


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards exactly those of its modules are in training mode that were before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Run a model as it is written, also where it or parts of it are compiled.

    Accelerate, and with it the Trainer of transformers, leaves a forward around the model's own that runs it in half
    precision; layers that are called one by one are not within.
    """
    parts = [*model.modules()]
    with ExitStack() as stack:
        if any(map(_is_compiled, parts)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for part in parts:
            if "_original_forward" in vars(part):
                stack.enter_context(replaced(part, "forward", vars(part)["_original_forward"]))
        yield


def _is_compiled(part: nn.Module) -> bool:
    """Whether ``part.compile()`` was called, it is ``torch.compile(part)``, or its forward was compiled."""
    is_forward = hasattr(part.forward, "_torchdynamo_orig_callable")
    return is_forward or part._compiled_call_impl is not None or "_orig_mod" in part._modules
