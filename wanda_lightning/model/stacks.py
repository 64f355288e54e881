"""Stacks of layers in any module: lists whose elements are layers of one kind, such as encoder, decoder and stages.

The rules are general: no model family is named. Which lists are called one layer after another is seen when the model
runs (:mod:`wanda_lightning.calibration.called_stacks`); here is what the structure tells.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from torch import nn

from wanda_lightning.model.language_model import is_language_model, uncompiled
from wanda_lightning.model.linears import is_linear, matrix_parameters, own_modules, prunable_linears

MOST = 0.75
"""The share of an outer list's weights from which on the lists within it are the stacks: stages consist of layers."""


def lists_of_layers(model: nn.Module, named: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Find the lists that may be stacks, also such as lie in one another.

    Args:
        model: Any module.
        named: Names of lists, where the user says which they are.

    Returns:
        The lists by name, in the order of the module: every ``ModuleList`` or ``Sequential`` whose elements are of one
        class, are no linears themselves, and hold some. Those that are named need only hold one.

    Raises:
        ValueError: If there is no list of a name.
    """
    lists = {name: m for name, m in own_modules(model) if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)}
    if named is None:
        return {name: m for name, m in lists.items() if _is_stack(m)}
    for name in named:
        if name not in lists or not prunable_linears(lists[name], name):
            holding = ", ".join(f"{each} ({len(m)})" for each, m in lists.items() if _is_stack(m))
            raise ValueError(
                f"{type(model).__name__} has no list of layers {name!r}; its lists of layers: {holding or 'none'}"
            )
    return {name: lists[name] for name in named}


def without_nested(lists: Mapping[str, nn.Module]) -> list[str]:
    """Choose between lists that lie in one another: the inner ones, where the outer one consists of them.

    Stages of a vision model hold lists of layers, and little else. Layers hold lists, too, such as of their own parts.

    Args:
        lists: Lists of layers by name.

    Returns:
        The names of those that were chosen, in the order of ``lists``.
    """
    chosen = {name for name in lists if not any(_is_within(name, outer) for outer in lists)}
    for outer in [*chosen]:
        within = {name: m for name, m in lists.items() if _is_within(name, outer)}
        inner = without_nested(within) if within else []
        if sum(_size(lists[name]) for name in inner) >= MOST * _size(lists[outer]) and inner:
            chosen = chosen - {outer} | {*inner}
    return [name for name in lists if name in chosen]


def no_stacks(model: nn.Module) -> ValueError:
    """Say that a model has no list that may be a stack."""
    why = "it has no ModuleList or Sequential of layers of one class that hold linears"
    if hasattr(model, "configure_model") and not any(True for _ in model.parameters()):
        why = "it holds no weights yet; call its configure_model() first, and prune the model that it then holds"
    return ValueError(f"{type(model).__name__} cannot be pruned layer by layer: {why}")


def stack_names(model: nn.Module) -> list[str]:
    """Name the stacks of a model by its structure alone, in the order of the module."""
    return without_nested(lists_of_layers(model))


def lists_in(model: nn.Module, asked: str | Sequence[str] | None) -> str | Sequence[str] | None:
    """Name the lists of layers of a model without running it.

    Args:
        model: The model.
        asked: What the user said of them.

    Returns:
        Of a language model what was asked for: its decoder is found by rule. Of others the names of all lists.
    """
    if is_language_model(model) and (asked is None or isinstance(asked, str)):
        return asked
    named = (asked,) if isinstance(asked, str) else asked
    return tuple(named or stack_names(model))


def outside_of(model: nn.Module, inside: Collection[nn.Module]) -> tuple[dict[str, int], float]:
    """Find the matrices of a model that lie in none of its layers.

    Args:
        model: The model.
        inside: The layers.

    Returns:
        The number of weights of each by name, and their share of all matrix weights. Embeddings, of inputs and of
        outputs, are left out.
    """
    covered = {parameter for layer in inside for parameter in layer.parameters()}
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left_out = {parameter for module in (head,) if isinstance(module, nn.Module) for parameter in module.parameters()}
    left_out |= {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    matrices = {name: p for p, name in matrix_parameters(model, "").items() if p not in left_out}
    outside = {name.removeprefix("."): p.numel() for name, p in matrices.items() if p not in covered}
    return outside, sum(outside.values()) / max(1, sum(p.numel() for p in matrices.values()))


def _is_within(name: str, outer: str) -> bool:
    return name != outer and name.startswith(f"{outer}." if outer else "")


def _is_stack(found: nn.ModuleList | nn.Sequential) -> bool:
    layers = [uncompiled(element) for element in found]
    alike = len({type(layer) for layer in layers}) == 1
    return alike and not any(map(is_linear, layers)) and all(prunable_linears(layer, "") for layer in layers)


def _size(module: nn.Module) -> int:
    return sum(linear.weight_OI.numel() for linear in prunable_linears(module, ""))
