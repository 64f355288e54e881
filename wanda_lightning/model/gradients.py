"""Which parameters gradients are taken of, for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def only_requiring_grad(module: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients be taken of some parameters alone; leave all as they were found.

    Args:
        module: The module.
        weights: Those of its parameters.
    """
    found = {parameter: parameter.requires_grad for parameter in module.parameters()}
    for parameter in found:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in found.items():
            parameter.requires_grad_(required)
