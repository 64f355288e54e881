"""Where the time of a pruning goes."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Step = TypeVar("Step")


class PhaseClock:
    """Seconds by phase: allocation, forwards between layers and with statistics, solving, training of what is kept."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(("allocation", "forward", "statistics", "solve", "reconstruction"), 0.0)
        self._started = time.perf_counter()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of those phases that there were."""
        return {phase: seconds for phase, seconds in self._seconds.items() if seconds}

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started

    def forwards(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Yield what is given, and count the time that it takes to come."""
        remaining = iter(steps)
        while True:
            with self.counted("forward"):
                try:
                    step = next(remaining)
                except StopIteration:
                    return
            yield step

    def spent(self, phase: str, seconds: Iterable[float]) -> None:
        """Note how much of the time that was counted for statistics last went into another phase."""
        spent = sum(seconds)
        self._seconds["statistics"] = max(0.0, self._seconds["statistics"] - spent)
        self._seconds[phase] += spent

    @contextmanager
    def counted(self, phase: str) -> Iterator[None]:
        """Count the time of a block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - started
