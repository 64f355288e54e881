"""Where the time of a pruning goes."""

import time
from collections.abc import Iterable


class PhaseClock:
    """Seconds by phase: forwards between layers, forwards with statistics, and solving.

    Layers that were only restored count in none of them.

    Args:
        calibrated: Whether there are forwards at all.

    Attributes:
        seconds: By phase.
    """

    def __init__(self, calibrated: bool) -> None:
        self.seconds = dict.fromkeys(("forward", "statistics", "solve") if calibrated else ("solve",), 0.0)
        self._last = time.perf_counter()
        self._forward = 0.0

    def reached(self) -> None:
        """Note that the inputs of a layer are there."""
        self._forward = self._lap()

    def pruned(self, solving: Iterable[float]) -> None:
        """Note that a layer is pruned, and how long solving its linears took."""
        solved, elapsed = sum(solving), self._lap()
        self.seconds["solve"] += solved
        if "forward" in self.seconds:
            self.seconds["forward"] += self._forward
            self.seconds["statistics"] += max(0.0, elapsed - solved)

    def left(self) -> None:
        """Note that a layer is done with: what comes next are forwards."""
        self._lap()

    def _lap(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self._last - before
