"""2:4-pruned linears for torch's semi-structured sparse kernels, on CUDA."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.sparsity import max_kept_per_group

log = logging.getLogger(__name__)

# torch's backends list more: in float32 the hardware keeps one of two, and float8 needs scales that nn.Linear lacks.
DTYPES = (torch.float16, torch.bfloat16, torch.int8)
AMPERE = (8, 0)
"""Compute capability of the oldest GPUs with sparse tensor cores."""


@dataclass(frozen=True)
class Conversion:
    """What became of the linears of a model.

    Attributes:
        converted: Names of those that sparse kernels compute now.
        skipped: The others, with the reason.
    """

    converted: list[str]
    skipped: dict[str, str]

    def __repr__(self) -> str:
        reasons = "".join(f"; {number} not: {why}" for why, number in Counter(self.skipped.values()).items())
        return f"{len(self.converted)} linears are computed by 2:4 sparse kernels{reasons}"


@torch.no_grad()
def to_semi_structured(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] | None = None
) -> Conversion:
    """Let torch's 2:4 sparse kernels compute the linears of a model that was pruned to 2:4.

    For inference on a GPU. It helps where many tokens are computed at once, and not when one token is decoded at a
    time: measure with ``benchmarks/semi_structured.py``. Every linear is checked first, as torch itself converts also
    what is not 2:4, to wrong weights. A converted model cannot be trained or saved: keep its folder.

    Args:
        model: A causal language model of transformers, on a CUDA device; changed in place.
        targets: Shell-style patterns of the linears to convert. Default: all of the decoder.
        ignore: Patterns of linears to leave alone.

    Returns:
        Which linears were converted, and why the others were not.

    Raises:
        ValueError: If the model is not on a GPU with such kernels, or no linear can be converted.
    """
    device = next(parameter.device for parameter in model.parameters())
    backend = _backend(device)
    layers = decoder_layers(model, targets, ignore)
    skipped = {name: reason for layer in layers for name, reason in layer.left_dense.items()}
    linears = []
    for linear in (linear for layer in layers for linear in layer.linears):
        if reason := _reason_to_skip(linear, device, backend._DTYPE_SHAPE_CONSTRAINTS):
            skipped[linear.name] = reason
        else:
            linears.append(linear)
    conversion = Conversion([linear.name for linear in linears], skipped)
    if not linears:
        raise ValueError(f"nothing can be converted: {conversion}")
    for linear in linears:
        sparse = backend.from_dense(linear.weight.detach().contiguous())
        cast(Any, linear.module).weight = nn.Parameter(sparse, requires_grad=False)
    log.info("%s", conversion)
    return conversion


def _backend(device: torch.device) -> Any:
    """Return the class of torch's sparse tensors that a device has kernels for."""
    if device.type != "cuda":
        there = "move it with model.to('cuda')" if torch.cuda.is_available() else "this machine shows none to torch"
        raise ValueError(f"2:4 sparse kernels need a CUDA GPU, and the model is on {device}: {there}")
    capability = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    if capability < AMPERE:
        raise ValueError(f"2:4 sparse kernels need a GPU of compute capability 8.0 or newer, not {gpu}")
    if torch.backends.cusparselt.is_available() and not torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS:
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    if capability[0] > AMPERE[0]:
        raise ValueError(f"on {gpu} 2:4 needs cuSPARSELt, which this torch lacks; its CUTLASS kernels are for 8.x")
    return torch.sparse.SparseSemiStructuredTensorCUTLASS


def _reason_to_skip(linear: PrunableLinear, device: torch.device, limits: dict[torch.dtype, Any]) -> str | None:
    """Say why a linear cannot be converted; None if it can. ``limits`` are torch's smallest blocks by dtype."""
    module, weight = linear.module, linear.weight.detach()
    if linear.expert is not None:
        return "experts that are fused into one weight have kernels of their own"
    if type(module).forward is not nn.Linear.forward:  # such as Falcon's, which transposes the weight
        return f"{type(module).__name__} computes in a way of its own"
    if weight.layout != torch.strided or type(weight) is not Tensor:
        return "the weight is no plain tensor: it is converted, quantised or sharded"
    if weight.device.type != device.type:
        return f"the weight is on {weight.device}"
    if weight.dtype not in DTYPES or weight.dtype not in limits:
        accepted = ", ".join(_short(dtype) for dtype in DTYPES if dtype in limits)
        return f"{_short(weight.dtype)} is none of {accepted}"
    rows, columns = limits[weight.dtype].sparse_min_rows, limits[weight.dtype].sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{tuple(weight.shape)} are no multiples of ({rows}, {columns})"
    if max_kept_per_group(weight != 0, 4) > 2:
        return "more than two of four consecutive inputs are not zero"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
