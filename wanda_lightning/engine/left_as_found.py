"""A model that is worked on is afterwards in the mode that it was in, and the random state is what it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from wanda_lightning.model.modes import as_written, in_eval_mode


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and run it uncompiled, without gradients; restore modes and the random state."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    random_state = torch.random.fork_rng(devices=devices)
    with torch.inference_mode(False), torch.no_grad(), random_state, as_written(model), in_eval_mode(model):
        yield
