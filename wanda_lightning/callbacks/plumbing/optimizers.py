"""The moment after a step of an optimizer, and the copies of weights that optimizers keep."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from wanda_lightning.callbacks.plumbing.averages import begin_averages
from wanda_lightning.model.replaced import replaced


def after_each_step(optimizer: Any, act: Callable[[], None]) -> Callable[[], None]:
    """Have something done after every step of an optimizer.

    Args:
        optimizer: One of torch, or what Lightning takes for one, such as a wrapper around another.
        act: Is called.

    Returns:
        Ends it.
    """
    if hasattr(optimizer, "_optimizer_step_post_hooks"):
        return optimizer.register_step_post_hook(lambda *_: act()).remove
    step, stack = optimizer.step, ExitStack()  # of a wrapper that leaves out what torch's optimizers begin with

    @wraps(step)
    def step_and_act(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        act()
        return result

    stack.enter_context(replaced(optimizer, "step", step_and_act))
    return stack.close


def extrapolated(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Return what weights are extrapolated with outside of training, by weight.

    Args:
        optimizer: Any; schedule-free ones (Defazio et al. 2024, arXiv:2405.15682) have such points, by the name of z.

    Returns:
        The points.
    """
    return {weight: copy for weight, name, copy in _of_the_shape_of_weights([optimizer]) if name == "z"}


@contextmanager
@torch.no_grad()
def copies_follow(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let copies of the weights follow a pruning: those in optimizers, and averages that no step has entered yet.

    Args:
        trainer: The Trainer. What its optimizers keep by parameter is a copy where it is equal to all that is not zero.
        module: Its module.
    """
    copies = [
        (weight, copy)
        for weight, _, copy in _of_the_shape_of_weights(trainer.optimizers)
        if bool(((copy.to(weight) == weight) | (weight == 0)).all())
    ]
    yield
    begin_averages(trainer, module)
    for weight, copy in copies:
        stays = (copy.to(weight) == weight).to(copy.device)  # in higher precision it may hold more than the weight
        copy.copy_(torch.where(stays, copy, weight.to(copy)))


def _of_the_shape_of_weights(optimizers: Iterable[Any]) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
    """Yield weights, and the names and values of what optimizers keep of their shape; nothing that is quantised."""
    for optimizer in optimizers:
        for weight, state in optimizer.state.items():
            for name, kept in state.items() if isinstance(weight, Tensor) and isinstance(state, dict) else ():
                if type(kept) is Tensor and kept.is_floating_point() and kept.shape == weight.shape:
                    yield weight, name, kept
