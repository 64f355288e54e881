"""Low-rank adapters on a pruned model, and merging them without losing its zeros; needs peft, the extra ``[lora]``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from wanda_lightning.arguments import is_fraction, plain_fields, positive_number, whole_number

Merge = Literal["none", "masked"]


@dataclass(frozen=True)
class LoraSettings:
    """Train low-rank adapters B A beside frozen weights W (LoRA, Hu et al. 2021, arXiv:2106.09685, section 4.1).

    The defaults are the set-up of the Wanda paper (Sun et al. 2023, arXiv:2306.11695, section 5).

    Args:
        rank: Rank r of B A, >= 1.
        alpha: B A is scaled by alpha / r, > 0.
        dropout: Fraction of the adapters' inputs that is dropped while training, in [0, 1).
        target_modules: Names of the linears that get an adapter.
        merge: What is saved after training: ``"none"`` the pruned model and the adapter, in folders of their own;
            ``"masked"`` one model, whose weights are (W + B A) * M with M = 1 where W is not zero. B A has no zeros, so
            a merge without M would undo the pruning, and is not offered.

    Raises:
        ValueError: If a setting is out of range.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    merge: Merge = "none"

    def __post_init__(self) -> None:
        plain_fields(self)
        whole_number("rank", self.rank, 1)
        positive_number("alpha", self.alpha)
        if not is_fraction(self.dropout):
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        names = self.target_modules
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f'target_modules must be a list of names such as ["q_proj"], got {names!r}')
        if self.merge not in get_args(Merge):
            raise ValueError(
                f"merge must be none (the adapter is saved alone) or masked ((W + B A) * M), got {self.merge!r}: any "
                "other merge would fill the zeros of the pruned weights"
            )


def add_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Freeze a model of transformers and give it adapters that are trained; its outputs do not change yet.

    Args:
        model: The model; changed in place.
        settings: Which adapters.

    Raises:
        ValueError: If no linear has one of the names, or peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError('adapters need peft: pip install "wanda-lightning[lora]"') from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    cast(Any, model).add_adapter(config)


def has_adapters(model: nn.Module) -> bool:
    """Whether some layer of a model has an adapter around it."""
    return bool(_adapted(model))


@torch.no_grad()
def merge_masked(model: nn.Module) -> None:
    """Add adapters to the weights that are not zero, W := (W + B A) * M with M = (W != 0), and remove them.

    Modules that were trained as a whole beside them (``modules_to_save``) take the place of those that they were.

    Args:
        model: A model of transformers with adapters; changed in place.

    Raises:
        ValueError: If an adapter has been merged already, with the weights' zeros filled.
    """
    _refuse_merged(model)
    for parent, name, layer in _adapted(model):
        setattr(parent, name, _merged(layer))
    for kept_by_peft in ("_hf_peft_config_loaded", "peft_config"):  # with them only an adapter would be saved
        model.__dict__.pop(kept_by_peft, None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # an ordinary model again


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Take the adapters out of a model for a while.

    Args:
        model: A model of transformers with adapters, or peft's wrapper of one.

    Yields:
        The model under the adapters, with the names that it had before.

    Raises:
        ValueError: If the adapters are merged into the weights.
    """
    _refuse_merged(model)
    inner = cast(Any, model)
    inner = inner.get_base_model() if hasattr(model, "get_base_model") else inner
    adapted, flag = _adapted(inner), inner.__dict__.pop("_hf_peft_config_loaded", None)
    for parent, name, layer in adapted:
        setattr(parent, name, _original(layer))
    try:
        yield inner
    finally:
        for parent, name, layer in adapted:
            setattr(parent, name, layer)
        if flag is not None:
            inner._hf_peft_config_loaded = flag


def save_adapter(model: nn.Module, folder: Path, base: Path) -> None:
    """Write the adapter of a model in peft's format.

    Args:
        model: The model with its adapter.
        folder: The folder to write to.
        base: Folder of the pruned model that it belongs to. On top of the dense model it would bring no zeros.
    """
    adapted = cast(Any, model)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)


def _adapted(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """List what peft has put around modules: the module that holds each, its name there, and what is around."""
    around = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and ("base_layer" in child._modules or _stands_in(child))
    ]
    inside = {part for _, _, layer in around for part in layer.modules()}  # experts may have several, one in another
    return [each for each in around if each[0] not in inside]


def _stands_in(layer: nn.Module) -> bool:
    """Whether a layer is trained, as a whole or some of its rows, in place of the original that it holds."""
    return "modules_to_save" in layer._modules or "token_adapter" in layer._modules


def _original(layer: Any) -> nn.Module:
    """Return the module under adapters."""
    while "base_layer" in layer._modules or _stands_in(layer):
        layer = layer.original_module if _stands_in(layer) else layer.base_layer
    return layer


def _merged(layer: Any) -> nn.Module:
    """Merge adapters into the module under them, and return it."""
    if _stands_in(layer):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    while "base_layer" in layer._modules:
        weight = layer.get_param() if hasattr(layer, "get_param") else layer.base_layer.weight
        kept = weight != 0
        layer.merge()
        weight.mul_(kept)
        layer = layer.base_layer
    return layer


def _refuse_merged(model: nn.Module) -> None:
    if any(getattr(layer, "merged_adapters", None) for layer in model.modules()):
        raise ValueError(
            "adapters have been merged into the pruned weights, and filled their zeros: unmerge them, then save the "
            "adapter alone (LoraSettings(merge='none')) or merge under the mask (merge='masked')"
        )
