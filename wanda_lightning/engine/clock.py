"""Where the time of a pruning goes."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
            with self._counted("forward"):
                try:
                    step = next(remaining)
                except StopIteration:
                    return
            yield step

    def allocation(self) -> AbstractContextManager[None]:
        """Count the time of a block that decides how much of each linear is pruned."""
        return self._counted("allocation")

    def statistics(self) -> AbstractContextManager[None]:
        """Count the time of a block."""
        return self._counted("statistics")

    def spent(self, phase: str, seconds: Iterable[float]) -> None:
        """Note how much of the time that was counted for statistics last went into another phase."""
        spent = sum(seconds)
        self._seconds["statistics"] = max(0.0, self._seconds["statistics"] - spent)
        self._seconds[phase] += spent

    @contextmanager
    def _counted(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - started
