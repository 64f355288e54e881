"""How much a layer holds where it waits in the middle of a call: what enters a linear, and what its code still keeps.

Before the last linear of an attention these are queries, keys and values, too, and from there on, if it is "eager", its
weights for all pairs of tokens. No formula knows that of every family, so a batch is run and looked at.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from wanda_lightning.model.hooks import before_calls


class Held(NamedTuple):
    """What is held where a module is called.

    Attributes:
        nbytes: All that was made and is still there.
        entering: Part of it: what enters the module.
    """

    nbytes: int
    entering: int


class _Living(TorchFunctionMode):
    """Within it, the storages that functions make are known for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        with suppress(NotImplementedError, RuntimeError):  # of tensors without a storage, as within torch.vmap
            given = {x.untyped_storage()._cdata for x in _tensors_in([args, kwargs])}
            for tensor in _tensors_in(out):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # else it is a view of what there was
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def size(self, tensor: Tensor | None = None) -> int:
        """Count the bytes that live, or those of a tensor, if it is among them."""
        living = {key: size for key, (storage, size) in self._made.items() if not storage.expired()}
        return sum(living.values()) if tensor is None else living.get(tensor.untyped_storage()._cdata, 0)


@torch.no_grad()
def held_before(modules: Iterable[nn.Module], run: Callable[[], Any]) -> dict[nn.Module, Held]:
    """Run something, and count what it holds whenever it calls certain modules.

    Args:
        modules: The modules.
        run: What is run.

    Returns:
        The most that was held, by module; those that are not called are not in it.
    """
    living, most = _Living(), dict[nn.Module, Held]()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering = next((living.size(x) for x in [*args, *kwargs.values()] if isinstance(x, Tensor)), 0)
        most[module] = max(Held(living.size(), entering), most.get(module, Held(0, 0)))

    with before_calls(modules, look), living:
        run()
    return most


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(part)
