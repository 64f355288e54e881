"""What the names of modules tell: which layer and kind a linear is of, and whether it is a router."""

from fnmatch import fnmatchcase

# Name components of the linears that choose experts in mixtures of experts. Pruned only when a target names them.
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})


def matches(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern fits a linear's name, or its end; what adapters add to it may be left out."""
    return any(fnmatchcase(n, p) for n in (name, name_without_adapters(name)) for p in (pattern, f"*.{pattern}"))


def kind_of(name: str, layer: str) -> str:
    """Name a matrix within its layer, with ``*`` for the numbers in it."""
    return ".".join("*" if part.isdigit() else part for part in name.removeprefix(f"{layer}.").split("."))


def name_without_adapters(name: str) -> str:
    """Return the name that a linear has without adapters around it."""
    return name.replace(".base_layer", "")


def is_router(name: str) -> bool:
    """Whether a name is that of a router of a mixture of experts, or of something in one."""
    return any(part in ROUTERS or part.endswith("_router") for part in name.split("."))
