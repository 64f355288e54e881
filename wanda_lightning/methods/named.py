"""The methods by the names that users type."""

from typing import Literal

from wanda_lightning.methods.ablate import Ablate
from wanda_lightning.methods.admm import ADMM
from wanda_lightning.methods.base import PruningMethod
from wanda_lightning.methods.magnitude import Magnitude
from wanda_lightning.methods.ria import RIA
from wanda_lightning.methods.sparsegpt import SparseGPT
from wanda_lightning.methods.wanda import Wanda

MethodName = Literal["magnitude", "wanda", "sparsegpt", "ablate", "admm", "ria"]
METHODS: dict[str, type[PruningMethod]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "ablate": Ablate,
    "admm": ADMM,
    "ria": RIA,
}


def as_method(method: PruningMethod | str) -> PruningMethod:
    """Take a method, or the name of one, which then has its default settings.

    Args:
        method: Such as ``Wanda()`` or ``"wanda"``.

    Returns:
        The method.

    Raises:
        ValueError: If there is no method of that name, or it is something else.

    Example:
        >>> as_method("wanda")
        Wanda(variant=False)
    """
    if isinstance(method, PruningMethod):
        return method
    if isinstance(method, str) and method.lower() in METHODS:
        return METHODS[method.lower()]()
    instance = f"; write {method.__name__}()" if isinstance(method, type) else ""
    raise ValueError(
        f"method must be one of {', '.join(METHODS)}, or a pruning method such as Wanda(), got {method!r}{instance}"
    )
