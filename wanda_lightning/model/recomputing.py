"""Gradients of a layer that is large: its parts keep what enters them, and compute the rest once more.

One checkpoint around a whole layer would save nothing: while the gradients are taken, all that is inside is there
again. With one around each part only the largest is. (Chen et al. 2016, arXiv:1604.06174.)
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from wanda_lightning.model.replaced import replaced


@contextmanager
def recomputing(module: nn.Module) -> Iterator[None]:
    """Let each part of a layer keep only what enters it, for a while; gradients stay the same.

    Args:
        module: The layer.
    """
    with ExitStack() as stack:
        for part in module.children():
            stack.enter_context(replaced(part, "forward", partial(checkpoint, part.forward, use_reentrant=False)))
        yield


def bytes_for_gradients(module: nn.Module, run: Callable[[], Any]) -> int:
    """Count what has to be kept of a forward pass until gradients are taken; a tensor that is used twice counts twice.

    Args:
        module: What runs; its parameters do not count.
        run: Runs it, with gradients.

    Returns:
        Bytes; nothing is kept here.
    """
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    kept = 0

    def count(tensor: Tensor) -> None:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in parameters else tensor.nbytes

    with saved_tensors_hooks(count, lambda nothing: nothing):
        run()
    return kept
