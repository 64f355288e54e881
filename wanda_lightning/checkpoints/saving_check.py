"""Whether a model can be saved, told from its structure: no weight is written, so that it takes seconds."""

import logging
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wanda_lightning.checkpoints.quantization import forget_quantization
from wanda_lightning.checkpoints.quiet import quiet, without_progress_bars
from wanda_lightning.model.language_model import is_of_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_can_be_saved(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
    """Save all of a model but its weights, and load it again with weights that take no memory.

    Of several processes only the first can: transformers saves nothing in the others.

    Args:
        model: The model, of any size, also streamed from disk. Of one that is not of transformers the state dict is
            saved, and looked at.
        tokenizer: What is saved beside it.

    Raises:
        ValueError: If saving fails, or what was saved would load as another model, with the reason.
    """
    if not is_of_transformers(model):
        check_weights_can_be_saved(model)
        return
    try:
        with quiet("transformers", logging.CRITICAL), without_progress_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reloaded = _dry_save(model, tokenizer)
    except OSError:  # no fault of the model's
        raise
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be saved: {' '.join(str(error).split())}") from error
    if difference := next(_differences(model, reloaded), None):
        raise ValueError(f"{type(model).__name__} cannot be saved so that it loads as it is: {difference}")


def check_weights_can_be_saved(model: nn.Module) -> None:
    """Make sure that the state dict of a module holds tensors only: safetensors stores nothing else.

    Args:
        model: The module.

    Raises:
        ValueError: If it holds something else, with the name.
    """
    if others := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{type(model).__name__} cannot be saved as safetensors: {others[0]} is no tensor")


def _dry_save(model: Any, tokenizer: Any) -> nn.Module:
    """Return the model that would be loaded, on the meta device."""
    from transformers.core_model_loading import revert_weight_conversion

    forget_quantization(model)
    copies = {name for names in _shared(model) for name in names[1:]}  # written once, and shared by what loads them
    weights = {name: torch.empty_like(w, device="meta") for name, w in model.state_dict().items() if name not in copies}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, state_dict={})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        config = type(model.config).from_pretrained(folder)
        return type(model).from_pretrained(
            None, config=config, state_dict=revert_weight_conversion(model, weights), dtype=model.dtype,
            device_map="meta", ignore_mismatched_sizes=True,
        )  # fmt: skip


def _differences(model: nn.Module, reloaded: nn.Module) -> Iterator[str]:
    has, loads = model.state_dict(), reloaded.state_dict()
    if compiled := next((name for name, part in model.named_modules() if "_orig_mod" in part._modules), None):
        yield f"torch.compile gave the weights of {compiled} other names: compile it in place, as by module.compile()"
    if absent := [name for name in loads if name not in has]:
        yield f"its config describes {absent[0]} and {len(absent) - 1} more weights that it does not have"
    if unknown := [name for name in has if name not in loads]:
        yield f"its class and config do not describe {unknown[0]} and {len(unknown) - 1} more weights that it has"
    for names in _shared(model):
        if names not in _shared(reloaded):
            yield f"{' and '.join(names)} share one weight, which its class does not declare: give each its own"
    for name, weight in has.items():
        yield from _difference(name, weight, loads[name])


def _difference(name: str, weight: Tensor, loaded: Tensor) -> Iterator[str]:
    if weight.shape != loaded.shape:
        yield f"{name} is {tuple(weight.shape)}, and its config says {tuple(loaded.shape)}"
    packed = weight.is_floating_point() and weight.itemsize == 1  # float8, which promotes to nothing
    if weight.dtype != loaded.dtype if packed else torch.promote_types(weight.dtype, loaded.dtype) != loaded.dtype:
        yield f"{name} is {weight.dtype}, and would load as {loaded.dtype}: convert it, or the rest, before pruning"


def _shared(model: nn.Module) -> list[list[str]]:
    """List the weights that have several names, each by its names."""
    names: dict[Any, list[str]] = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        address = weight.data_ptr()  # 0 on the meta device, and of an empty one
        names[(address, weight.shape) if address else weight].append(name)
    return [shared for shared in names.values() if len(shared) > 1]
