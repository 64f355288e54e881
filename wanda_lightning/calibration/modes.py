"""Contexts of torch that a model's own code may be within where it calls a layer: autocast, and modes of functions."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Types of device that may have autocast on, each for itself."""


class Modes(NamedTuple):
    """What torch keeps of them, for a thread.

    Attributes:
        autocast: By type of device, whether it is on, and its data type.
        functions: Modes such as ``torch.device("cpu")``, outermost first.
    """

    autocast: dict[str, tuple[bool, torch.dtype]]
    functions: list[TorchFunctionMode]

    @classmethod
    def now(cls) -> "Modes":
        """Return those that there are."""
        devices = {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES}
        return cls(devices, _get_current_function_mode_stack())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be within them again, as far as one is not."""
        now = Modes.now()
        with ExitStack() as stack:
            for device, (enabled, dtype) in self.autocast.items():
                if (enabled, dtype) != now.autocast[device]:
                    stack.enter_context(torch.autocast(device, dtype, enabled))
            for mode in self.functions:
                if mode not in now.functions:
                    _push_mode(mode)  # to enter it twice would change what it remembers
                    stack.callback(_pop_mode)
            yield
