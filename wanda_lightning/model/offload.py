"""Weights that accelerate's hooks (``device_map``) keep on disk, or in RAM to spare a GPU's memory.

Such a parameter is on the meta device; the hook of its module knows where its values are, and loads them for every
call. The functions here load a whole layer once, for as long as it is needed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of a module are kept elsewhere."""
    return any(_hook(part) is not None for part in module.modules())


def is_on_disk(module: nn.Module) -> bool:
    """Whether weights of a module are kept in files."""
    return any(
        _in_ram(hook, name) is None for part in module.modules() if (hook := _hook(part)) for name in _offloaded(part)
    )


def names_without_values(model: nn.Module) -> list[str]:
    """List parameters and buffers that have no values: the model was made on the meta device and never loaded."""
    return [
        f"{prefix}.{name}".removeprefix(".")
        for prefix, part in model.named_modules()
        for name, values in (part._parameters | part._buffers).items()
        if values is not None and values.is_meta and _hook(part) is None
    ]


def device_of(module: nn.Module) -> torch.device:
    """Return the device where a module without children computes."""
    hook = _hook(module)
    return torch.device(hook.execution_device) if hook else next(module.parameters()).device


@contextmanager
def in_memory(layer: nn.Module) -> Iterator[None]:
    """Load the offloaded weights of a layer for a while, so that calls load nothing; others stay as they are."""
    loaded: list[tuple[nn.Module, str, nn.Parameter]] = []
    hooks = []
    try:
        for part in layer.modules():
            if hook := _hook(part):
                for name, parameter in _offloaded(part).items():
                    values = hook.weights_map[name].to(hook.execution_device, copy=True)  # never the file's own pages
                    part._parameters[name] = nn.Parameter(values, requires_grad=False)
                    loaded.append((part, name, parameter))
                hooks.append((hook, hook.offload))
                hook.offload = False
        yield
    finally:
        for part, name, parameter in loaded:
            part._parameters[name] = parameter
        for hook, before in hooks:
            hook.offload = before


def write_back(layer: nn.Module, weights: Mapping[str, nn.Parameter], file: Path | None) -> None:
    """Keep changed weights of a layer that is :func:`in_memory`, so that the next call finds them.

    Args:
        layer: The layer.
        weights: The changed parameters, by the names that they have in ``file``.
        file: A safetensors file that holds the changed weights, if weights are kept on disk. The file that they were
            loaded from does not change.
    """
    names = {weight: name for name, weight in weights.items()}
    for part in layer.modules():
        hook = _hook(part)
        for name, parameter in part._parameters.items():
            if parameter is None or parameter not in names or hook is None:
                continue
            if (values := _in_ram(hook, name)) is not None:
                values.copy_(parameter.detach())
            elif file is not None:
                hook.weights_map.dataset.index[f"{hook.weights_map.prefix}{name}"] = {
                    "safetensors_file": str(file),
                    "weight_name": names[parameter],
                    "dtype": str(parameter.dtype).removeprefix("torch."),
                }


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values of every parameter, wherever they are, one after the other."""
    for prefix, part in model.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{name}".removeprefix(".")
                yield full, stored_tensor(model, full)


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what the files of a model hold: the parameters, and those buffers that are not made anew."""
    yield from stored_parameters(model)
    persistent = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def stored_tensor(model: nn.Module, name: str) -> Tensor:
    """Return the values of a parameter or buffer, wherever they are."""
    prefix, _, own = name.rpartition(".")
    part = model.get_submodule(prefix)
    values = getattr(part, own).detach()
    hook = _hook(part) if values.is_meta else None
    return values if hook is None else hook.weights_map[own]


def shapes_on_disk(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield the name of every parameter that is kept in files, its shape in them, and the one that it should have."""
    from safetensors import safe_open

    for prefix, part in model.named_modules():
        hook = _hook(part)
        for name, parameter in _offloaded(part).items() if hook else ():
            if _in_ram(hook, name) is None:
                stored = hook.weights_map.dataset.index[f"{hook.weights_map.prefix}{name}"]
                with safe_open(stored["safetensors_file"], "pt") as file:
                    shape = file.get_slice(stored["weight_name"]).get_shape()
                yield f"{prefix}.{name}".removeprefix("."), tuple(shape), tuple(parameter.shape)


def _hook(part: nn.Module) -> Any:
    """Return the hook of accelerate that loads a module's own weights, or None."""
    hook = getattr(part, "_hf_hook", None)
    chained = getattr(hook, "hooks", (hook,))
    return next((each for each in chained if getattr(each, "weights_map", None) is not None), None)


def _offloaded(part: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in part._parameters.items() if p is not None and p.is_meta}


def _in_ram(hook: Any, name: str) -> Tensor | None:
    """Return the values of a weight that is kept in RAM; None if it is kept on disk."""
    weights = hook.weights_map
    kept, full = getattr(weights, "dataset", weights), getattr(weights, "prefix", "") + name
    kept = getattr(kept, "state_dict", kept)
    return kept.get(full) if isinstance(kept, Mapping) else None
