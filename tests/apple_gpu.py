"""An Apple GPU for tests: tensors that say they are on it, are computed on the CPU, and refuse what it cannot do.

Metal has no float64, operators of torch without a kernel for it fail, and so does a tensor of it beside one of the CPU.
To torch's own C++ code the tensors are on the meta device, as that of an Apple GPU is missing in builds for other
machines; where C++ code makes a tensor beside such a one, it asks for the meta device, too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

APPLE_GPU = torch.device("mps", 0)
aten = torch.ops.aten
MIXES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
"""Operators that take tensors of both devices."""


@contextmanager
def apple_gpu() -> Iterator[None]:
    """Let there be an Apple GPU. Parameters that are moved to it are new ones, as ``.data`` cannot change its class."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Functions(), _Operators():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def without_apple_gpu() -> AbstractContextManager[None]:
    """Let there be none for a while, and a meta device of its own again: models are loaded by way of that."""
    return _disable_current_modes()


def values_of(tensor: Tensor) -> Tensor:
    """Return the values of a tensor of either device, on the CPU."""
    return tensor.on_cpu if isinstance(tensor, _AppleTensor) else tensor.detach()


class _AppleTensor(Tensor):
    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "_AppleTensor":
        if on_cpu.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        layout = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset()}
        with torch.inference_mode(False):  # where a tensor of another class cannot be made
            return Tensor._make_wrapper_subclass(cls, on_cpu.size(), dtype=on_cpu.dtype, device="meta", **layout)

    def __init__(self, on_cpu: Tensor) -> None:
        self.on_cpu = on_cpu

    device = property(lambda self: APPLE_GPU)
    is_meta = property(lambda self: False)

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != APPLE_GPU.type:
            return super().to(*args, copy=copy, **kwargs)
        if dtype in (None, self.dtype) and not copy:
            return self
        layout = {name: value for name, value in kwargs.items() if name == "memory_format"}
        return super().to(dtype or self.dtype, copy=copy, **layout)

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(APPLE_GPU)

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    def __repr__(self) -> str:
        return f"{self.on_cpu} on an Apple GPU"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:  # C++ code fills it
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):  # and what a list in an index becomes
            args = (args[0], tuple(torch.tensor(each) if isinstance(each, list) else each for each in args[1]))
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator of torch: on the values, if one of its tensors is on the Apple GPU or the new one is to be."""
    if func is aten._fused_sdp_choice.default:
        return 0  # attention is made of other operators
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    apples = {id(each.on_cpu): each for each in tensors if isinstance(each, _AppleTensor)}
    asked = kwargs.get("device")
    to_apple = bool(apples) if asked is None else torch.device(asked).type in ("mps", "meta")
    if not apples and not to_apple:
        return func(*args, **kwargs)
    if apples and not _has_kernel(func.name().removeprefix("aten::")):
        raise NotImplementedError(f"The operator '{func.name()}' is not currently implemented for the MPS device.")
    if apples and func not in MIXES and any(each.dim() and not isinstance(each, _AppleTensor) for each in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, found mps:0 and cpu, in {func.name()}")
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            func(*args, **kwargs)  # changes the shape of what says that it is there
    on_cpu = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    out = func(*_values(args), **_values(on_cpu))
    if func is aten.copy_.default:
        return args[0]

    def as_apple(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return apples[id(each)] if id(each) in apples else _AppleTensor(each)

    return tree_map(as_apple, out) if to_apple else out


def _values(given: Any) -> Any:
    return tree_map(lambda each: each.on_cpu if isinstance(each, _AppleTensor) else each, given)


@cache
def _operators() -> dict[str, dict[str, Any]]:
    text = (files("torchgen") / "packaged/ATen/native/native_functions.yaml").read_text()
    return {entry["func"].partition("(")[0]: entry for entry in yaml.load(text, yaml.CSafeLoader)}


def _has_kernel(name: str) -> bool:
    """Tell whether torch has a kernel of an operator for Apple's GPUs, or makes it of others."""
    entry = _operators().get(name, {})
    if "structured_delegate" in entry:
        return _has_kernel(entry["structured_delegate"])
    keys = {key.strip() for names in entry.get("dispatch", ["Composite"]) for key in names.split(",")}
    return any(key == "MPS" or key.startswith("Composite") for key in keys)
