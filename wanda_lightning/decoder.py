"""Where a model keeps its decoder layers and the linears in them: the only file that knows model families.

Shapes: O out features, I in features, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn

# Name components of the linears that choose experts in mixtures of experts. Pruned only when a target names them.
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})


@dataclass(frozen=True)
class PrunableLinear:
    """One matrix of a decoder layer, seen as (out_features, in_features) whatever its module stores."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The module's weight as it is stored."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def weight_OI(self) -> Tensor:
        """A view of the weight, shape (out_features, in_features): writing to it changes the module."""
        weight = self.weight.detach()
        return weight.t() if _is_conv1d(self.module) else weight

    @property
    def is_router(self) -> bool:
        """Whether the linear chooses experts rather than transforming hidden states."""
        return not ROUTERS.isdisjoint(self.name.split("."))


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer, those of its linears that are to be pruned, and why the others are not."""

    name: str
    module: nn.Module
    linears: list[PrunableLinear]
    left_dense: dict[str, str]


def causal_lm(module: nn.Module) -> nn.Module:
    """Find the Hugging Face model that a module is or holds.

    Args:
        module: A model of transformers, or any module (such as a LightningModule) that holds exactly one.

    Returns:
        The outermost model.

    Raises:
        ValueError: If there is none, or more than one side by side.
    """
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if _is_causal_lm(child) and not any(name.startswith(f"{outer}.") or outer == "" for outer in found):
            found[name] = child
    if len(found) != 1:
        held = ", ".join(f"{name} ({type(model).__name__})" for name, model in found.items()) or "none"
        raise ValueError(
            f"{type(module).__name__} must hold exactly one transformers model to prune, found: {held}. "
            "Models load in __init__ or configure_model; with several, prune the one you mean with prune_model."
        )
    return next(iter(found.values()))


def decoder_layers(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] | None = None
) -> list[DecoderLayer]:
    """List the decoder layers of a model with the linears that are to be pruned.

    The decoder layers are the ``ModuleList`` with the most parameters in which every element holds a linear; it is
    looked for in the model's own decoder first. Every ``nn.Linear`` and ``transformers.Conv1D`` in them is prunable;
    routers of mixtures of experts only when a target names them.

    Args:
        model: A causal language model of transformers.
        targets: Shell-style patterns over linear names; only linears that match one are pruned. A pattern matches the
            full name (``"model.layers.0.*"``) or its end (``"q_proj"``). Default: all but routers.
        ignore: Patterns in the same style of linears to leave alone.

    Returns:
        All decoder layers in order, also those in which nothing is pruned.

    Raises:
        ValueError: If no decoder layers are found, their matrix weights are mostly not in linears, or a pattern
            matches nothing.
    """
    prefix, modules = _layer_list(model)
    linears = [
        [
            PrunableLinear(name, child)
            for name, child in layer.named_modules(prefix=f"{prefix}.{i}")
            if _is_linear(child)
        ]
        for i, layer in enumerate(modules)
    ]
    _check_coverage(prefix, modules, linears)
    names = [linear.name for layer in linears for linear in layer]
    for pattern in [*(targets or []), *(ignore or [])]:
        if not any(_matches(name, pattern) for name in names):
            examples = ", ".join(names[: len(linears[0])])
            raise ValueError(
                f"the pattern {pattern!r} matches no linear of the decoder; the first layer has {examples}"
            )

    def reason_to_leave(linear: PrunableLinear) -> str | None:
        if any(_matches(linear.name, pattern) for pattern in ignore or []):
            return "ignored"
        if targets is None:
            return "router" if linear.is_router else None
        return None if any(_matches(linear.name, pattern) for pattern in targets) else "no target"

    layers = []
    for i, (module, layer) in enumerate(zip(modules, linears, strict=True)):
        reasons = {linear.name: reason_to_leave(linear) for linear in layer}
        wanted = [linear for linear in layer if reasons[linear.name] is None]
        left_dense = {name: reason for name, reason in reasons.items() if reason is not None}
        layers.append(DecoderLayer(f"{prefix}.{i}", module, wanted, left_dense))
    return layers


def max_sequence_length(model: nn.Module) -> int | None:
    """Return the longest sequence the model's positions allow, or None where the config does not say."""
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _is_causal_lm(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module, "get_input_embeddings")


def _is_conv1d(module: nn.Module) -> bool:
    # transformers.pytorch_utils.Conv1D (GPT-2), recognised without importing transformers; its weight is (in, out).
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the largest list of layers, in the model's own decoder first: an encoder's may be larger."""
    names = {module: name for name, module in model.named_modules()}
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model):
        lists = [m for m in root.modules() if isinstance(m, nn.ModuleList)] if isinstance(root, nn.Module) else []
        lists = [m for m in lists if len(m) and m in names and all(any(map(_is_linear, e.modules())) for e in m)]
        if lists:
            largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
            return names[largest], largest
    raise ValueError(
        f"no decoder layers found in {type(model).__name__}: expected a ModuleList whose elements all hold an "
        f"nn.Linear or Conv1D, among {', '.join(name for name, _ in model.named_children()) or 'no children'}"
    )


def _check_coverage(prefix: str, layers: nn.ModuleList, linears: list[list[PrunableLinear]]) -> None:
    """Refuse a decoder most of whose matrix weights lie outside linears: pruning it would do next to nothing."""
    covered = {linear.weight for layer in linears for linear in layer}
    matrices = {name: p for name, p in layers.named_parameters(prefix=prefix) if p.dim() >= 2}
    outside = {name: p for name, p in matrices.items() if p not in covered}
    share = sum(p.numel() for p in outside.values()) / max(1, sum(p.numel() for p in matrices.values()))
    if share > 0.5:
        largest = sorted(outside, key=lambda name: -outside[name].numel())[:3]
        raise ValueError(
            f"{share:.0%} of the decoder's matrix weights are not in linears and would stay dense; the largest: "
            + ", ".join(f"{name} {tuple(outside[name].shape)}" for name in largest)
        )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
