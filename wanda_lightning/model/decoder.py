"""Where a model keeps its decoder layers, and which of their linears are to be pruned.

The rules are general: no model family is named.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from wanda_lightning.model.language_model import is_language_model, uncompiled
from wanda_lightning.model.linears import PrunableLinear, is_linear, matrix_parameters, own_modules, prunable_linears
from wanda_lightning.model.names import is_router, list_of, matches
from wanda_lightning.model.quantized import refuse_quantized
from wanda_lightning.model.stacks import lists_of_layers


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer, those of its linears that are to be pruned, and why its other matrices are not.

    Parameters that change because their rows or columns move are ``moved``, by name, pruned or not.
    """

    name: str
    module: nn.Module
    linears: list[PrunableLinear]
    left_dense: dict[str, str]
    moved: Mapping[str, nn.Parameter] = field(default_factory=dict)

    @property
    def list_name(self) -> str:
        """Name of the list that holds the layer, such as ``"model.layers"``."""
        return list_of(self.name)

    @property
    def is_matrix(self) -> bool:
        """Whether it is no layer but a matrix outside of the layers, which a target named."""
        return any(linear.module is self.module for linear in self.linears)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters that change, by name; experts may share one."""
        return {linear.parameter_name: linear.weight for linear in self.linears} | {**self.moved}


def decoder_layers(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
) -> list[DecoderLayer]:
    """List the decoder layers of a model with the linears that are to be pruned.

    The decoder layers are the ``ModuleList`` with the most parameters in which every element holds a linear; it is
    looked for in the model's own decoder first, and not in parts for other inputs than text. Where it is held by one of
    several modules of a class, as in HRM-Text, the lists of the others belong to it. Every ``nn.Linear``,
    ``transformers.Conv1D`` and ``Conv2d`` (without groups) in them is prunable, and every expert's matrix of fused
    experts (3-D parameters). Routers of mixtures of experts and linears with at most 4 inputs or outputs are pruned
    only when a target names them.

    Args:
        model: A causal language model of transformers.
        targets: Shell-style patterns over linear names; only linears that match one are pruned. A pattern matches the
            full name (``"model.layers.0.*"``) or its end (``"q_proj"``). Default: all but routers and thin linears.
        ignore: Patterns in the same style of linears to leave alone.
        layers: The name of the ``ModuleList`` of decoder layers, such as ``"model.layers"``, where the rule picks
            another one; or the names of several lists of layers, in the order in which the model calls them. Of any
            model then: a target that fits none of their linears may fit one that lies outside, such as a patch
            embedding; it is a layer of its own, behind the others.

    Returns:
        All decoder layers in order, also those in which nothing is pruned. (Encoder layers, too, if they are named.)

    Raises:
        ValueError: If the model is quantised, no decoder layers are found, their matrix weights are mostly not in
            linears, or a pattern matches nothing.
    """
    model = uncompiled(model)
    refuse_quantized(model)
    lists = _layer_list(model, layers) if layers is None or isinstance(layers, str) else lists_of_layers(model, layers)
    modules = {
        f"{name}.{number}".removeprefix("."): layer  # a Sequential may be the whole model
        for name, found in lists.items()
        for number, layer in cast(Any, found)._modules.items()
    }
    linears = {name: prunable_linears(layer, name) for name, layer in modules.items()}
    every = [linear for layer in linears.values() for linear in layer]
    if layers is not None and not isinstance(layers, str):
        for linear in _named_outside(model, every, targets):
            modules[linear.name], linears[linear.name] = linear.module, [linear]
            every.append(linear)
    uncovered = _uncovered(modules, linears)
    for pattern in [*(targets or []), *(ignore or [])]:
        check_pattern(pattern, every)
    return [_decide(name, modules[name], found, uncovered[name], targets, ignore) for name, found in linears.items()]


def every_linear(model: nn.Module, layers: str | Sequence[str] | None = None) -> list[PrunableLinear]:
    """List what may have been pruned.

    Args:
        model: The model.
        layers: See :func:`decoder_layers`.

    Returns:
        Those of a language model's decoder; of others, and where ``layers`` names several lists, of the whole model.
    """
    if (layers is None or isinstance(layers, str)) and is_language_model(model):
        return [linear for layer in decoder_layers(model, ["*"], layers=layers) for linear in layer.linears]
    return prunable_linears(uncompiled(model), "")


def coverage(layers: Iterable[DecoderLayer]) -> float:
    """Measure the share of the matrix weights of decoder layers that is to be pruned, between 0 and 1.

    Matrices are parameters with two or more dimensions; biases and adapters do not count.
    """
    pruned = total = 0
    for layer in layers:
        pruned += sum(linear.weight_OI.numel() for linear in layer.linears)
        total += sum(parameter.numel() for parameter in matrix_parameters(layer.module, layer.name))
    return pruned / max(1, total)


def count_matches(layers: Sequence[DecoderLayer], patterns: Iterable[str]) -> dict[str, int]:
    """Count the linears, pruned or not, that each pattern over names fits."""
    names = [name for layer in layers for name in [*(linear.name for linear in layer.linears), *layer.left_dense]]
    return {pattern: sum(matches(name, pattern) for name in names) for pattern in patterns}


def check_pattern(pattern: str, linears: Sequence[PrunableLinear]) -> None:
    """Refuse a pattern over names that matches none of some linears.

    Args:
        pattern: A shell-style pattern.
        linears: The linears, one of which it has to match.

    Raises:
        ValueError: If it does not, with names that there are.
    """
    if not any(linear.matches(pattern) for linear in linears):
        examples = list(dict.fromkeys(linear.name for linear in linears))[:12]
        raise ValueError(f"the pattern {pattern!r} matches no linear of the decoder; among others it has {examples}")


def _named_outside(
    model: nn.Module, inside: Sequence[PrunableLinear], targets: Sequence[str] | None
) -> list[PrunableLinear]:
    """Find linears outside of the layers that targets name: by patterns that fit none inside."""
    reach = [pattern for pattern in targets or [] if not any(linear.matches(pattern) for linear in inside)]
    names = {linear.name for linear in inside}
    every = prunable_linears(model, "") if reach else []
    return [x for x in every if x.name not in names and any(x.matches(pattern) for pattern in reach)]


def _decide(
    name: str,
    module: nn.Module,
    linears: list[PrunableLinear],
    uncovered: dict[str, nn.Parameter],
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
) -> DecoderLayer:
    """Choose the linears of a layer that are to be pruned, and say of the other matrices why they are not."""

    def reason_to_leave(linear: PrunableLinear) -> str | None:
        if any(linear.matches(pattern) for pattern in ignore or []):
            return "ignored"
        if targets is not None:
            return None if any(linear.matches(pattern) for pattern in targets) else "no target"
        return "router" if linear.is_router else "thin" if linear.is_thin else None

    reasons = {linear.name: reason_to_leave(linear) for linear in linears}
    wanted = [linear for linear in linears if reasons[linear.name] is None]
    left_dense = {linear: reason for linear, reason in reasons.items() if reason is not None}
    left_dense |= {matrix: "router" if is_router(matrix) else "not in a linear" for matrix in uncovered}
    return DecoderLayer(name, uncompiled(module), wanted, left_dense)


def _layer_list(model: nn.Module, named: str | None) -> dict[str, nn.Module]:
    """Find the largest list of layers, in the model's own decoder first: an encoder's may be larger; by its name."""
    names = {m: name for name, m in own_modules(model) if isinstance(m, nn.ModuleList) and any(map(_has_linear, m))}
    if named is not None:
        for module, name in names.items():
            if name == named:
                return {name: module}
        there = ", ".join(f"{name} ({len(module)})" for module, name in names.items()) or "none"
        raise ValueError(f"{type(model).__name__} has no list of layers {named!r}; its lists with linears: {there}")
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model):
        inside = _reading_text(root) if isinstance(root, nn.Module) else set()
        lists = [m for m in names if m in inside and all(map(_has_linear, m))]
        if lists:
            largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
            name, size = names[largest], len(largest)
            parts = [names[m] for m in lists if list_of(names[m]) == list_of(name) and len(m) == size > 1]
            if len(parts) > 1:  # as XLM's
                raise ValueError(
                    f"the parts of the {size} decoder layers are in several lists ({', '.join(parts)}), and those of "
                    f"one can be pruned: name it, such as layers={name!r}; the others stay dense"
                )
            return {names[m]: m for m in lists if m is largest or _is_twin(model, names[m], name)}
    raise ValueError(
        f"no decoder layers found in {type(model).__name__}: expected a ModuleList whose elements all hold an "
        f"nn.Linear or Conv1D, among {', '.join(name for name, _ in model.named_children()) or 'no children'}"
    )


def _is_twin(model: nn.Module, one: str, other: str) -> bool:
    """Whether two lists are in two modules of one class, as HRM-Text's for slow and for fast states."""
    holders = {model.get_submodule(list_of(name)) for name in (one, other)}
    return len(holders) == 2 and len({*map(type, holders)}) == 1


def _reading_text(root: nn.Module) -> set[nn.Module]:
    """Return the modules of a model that are in none of its parts for other inputs, such as images."""
    inside = {module for _, module in own_modules(root)}
    others = [m for m in inside if m is not root and getattr(m, "main_input_name", "input_ids") != "input_ids"]
    return inside.difference(module for other in others for _, module in own_modules(other))


def _has_linear(module: nn.Module) -> bool:
    return any(is_linear(child) for _, child in own_modules(module))


def _uncovered(
    modules: Mapping[str, nn.Module], linears: Mapping[str, list[PrunableLinear]]
) -> dict[str, dict[str, nn.Parameter]]:
    """Find the matrices of each layer that lie outside linears; refuse a decoder that consists of such.

    Pruning it would do next to nothing, and say that it did.
    """
    total = 0
    uncovered: dict[str, dict[str, nn.Parameter]] = {}
    for name, module in modules.items():
        covered = {parameter for linear in linears[name] for parameter in linear.module.parameters()}
        matrices = matrix_parameters(module, name)
        uncovered[name] = {matrix: p for p, matrix in matrices.items() if p not in covered}
        total += sum(p.numel() for p in matrices)
    outside = {name: p for layer in uncovered.values() for name, p in layer.items()}
    share = sum(p.numel() for p in outside.values()) / max(1, total)
    if share > 0.5:
        largest = sorted(outside, key=lambda name: -outside[name].numel())[:3]
        raise ValueError(
            f"{share:.0%} of the decoder's matrix weights are not in linears and would stay dense; the largest: "
            + ", ".join(f"{name} {tuple(outside[name].shape)}" for name in largest)
        )
    return uncovered
