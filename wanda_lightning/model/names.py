"""What the names of modules tell: which layer and kind a linear is of, and whether it is a router."""

from fnmatch import fnmatchcase

# Name components of the linears that choose experts in mixtures of experts. Pruned only when a target names them.
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})


def matches(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern fits a linear's name, or its end; what adapters add to it may be left out."""
    return any(fnmatchcase(n, p) for n in (name, name_without_adapters(name)) for p in (pattern, f"*.{pattern}"))


def kind_of(name: str, layer: str = "") -> str:
    """Name a matrix within its layer, with ``*`` for the numbers of experts.

    Args:
        name: The matrix, ``"model.layers.3.mlp.experts.7.up_proj"``.
        layer: Its decoder layer, ``"model.layers.3"``; left out where the name already starts within the layer.

    Returns:
        Its kind, ``"mlp.experts.*.up_proj"``.
    """
    within = name.removeprefix(f"{layer}.") if layer else name
    return ".".join("*" if part.isdigit() else part for part in within.split("."))


def list_of(layer: str) -> str:
    """Return the name of the list that holds a decoder layer: ``"model.layers"`` of ``"model.layers.3"``."""
    return layer.rpartition(".")[0]


def number_of(layer: str) -> int | None:
    """Return the number of a decoder layer in its list: 3 of ``"model.layers.3"``; None for other names."""
    number = layer.rpartition(".")[2]
    return int(number) if number.isdigit() else None


def name_without_adapters(name: str) -> str:
    """Return the name that a linear has without adapters around it."""
    return name.replace(".base_layer", "")


def is_router(name: str) -> bool:
    """Whether a name is that of a router of a mixture of experts, or of something in one."""
    return any(part in ROUTERS or part.endswith("_router") for part in name.split("."))
