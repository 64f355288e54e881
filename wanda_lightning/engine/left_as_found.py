"""A model that is worked on is afterwards in the mode that it was in, and the random state is what it was."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and run it uncompiled, without gradients; restore modes and the random state."""
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in modules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
