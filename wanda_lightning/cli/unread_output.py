"""Output that nobody reads any more, as behind ``| head``, ends no run."""

import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any

from typing_extensions import override


class _Pipe(FileIO):
    """A file of the process; what is written to it when its reader is gone goes nowhere."""

    @override
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def outlive_readers() -> None:
    """Let standard output and error go nowhere when their readers are gone; streams that others have set stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper) and stream is getattr(sys, f"__{name}__") and not stream.isatty():
            stream.flush()
            pipe = BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
            setattr(sys, name, TextIOWrapper(pipe, stream.encoding, stream.errors, line_buffering=True))
