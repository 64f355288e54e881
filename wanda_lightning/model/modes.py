"""How a model runs for a while: in eval mode, uncompiled."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


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
    """Run a model as it is written, also where it or parts of it are compiled."""
    compiled = any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield
