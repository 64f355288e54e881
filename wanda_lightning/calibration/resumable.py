"""Calls that can be left in the middle, and go on later: greenlets, of which one runs at a time.

A thread for each call would do as well, but each thread that computes brings a team of OpenMP threads on a CPU and a
handle of cuBLAS with its workspace on a GPU. All greenlets live in one thread.
"""

from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from wanda_lightning.calibration.modes import Modes


class Resumable:
    """A call that may pause itself.

    Args:
        function: What is called, without arguments.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._greenlet = greenlet(function)
        self._greenlet.gr_context = copy_context()  # else variables of the context would have their defaults
        self._state = _ThreadState()
        self._functions: list[TorchFunctionMode] = []  # that it is within where it pauses, outermost first
        self._result: Any = None

    @property
    def is_done(self) -> bool:
        """Whether the function has returned, raised or was given up."""
        return self._greenlet.dead

    def resume(self) -> Any:
        """Let the function run until it pauses or returns.

        Returns:
            What it gave to :func:`pause`; None if it returned.
        """
        said = self._switch(self._greenlet.switch)
        if self.is_done:
            self._result = said
            return None
        return said

    def take_result(self) -> Any:
        """Return what the function returned, once: it is not kept."""
        result, self._result = self._result, None
        return result

    def give_up(self) -> None:
        """Unwind the function where it pauses; it does not go on."""
        if self._greenlet and not self.is_done:
            with suppress(GreenletExit, RuntimeError):  # the latter where the garbage collector was faster
                self._switch(partial(self._greenlet.throw, GreenletExit))

    def _switch(self, switch: Callable[[], Any]) -> Any:
        """Go into the function, in its own modes and those of who resumes it; come back in the latter alone."""
        outside, self._greenlet.parent = _ThreadState(), getcurrent()
        depth = len(_get_current_function_mode_stack())
        self._state.enter()
        for mode in self._functions:
            _push_mode(mode)
        try:
            return switch()
        finally:
            self._functions = [_pop_mode() for _ in _get_current_function_mode_stack()[depth:]][::-1]
            self._state = _ThreadState()
            outside.enter()


def pause(said: Any) -> None:
    """Within a function that is resumable: wait until it is resumed, and say something to who resumed it last."""
    getcurrent().parent.switch(said)


class _ThreadState:
    """What torch keeps for a thread and a function may have changed when it pauses: gradients, autocast and the GPU."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._autocast = Modes.now().autocast
        # Of the current GPU, which is what kernels of Triton start on.
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def enter(self) -> None:
        torch._C._set_grad_enabled(self._grad)
        for device, (enabled, dtype) in self._autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)
