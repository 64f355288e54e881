"""What a search keeps to: a perplexity or another metric that a validation logs, or the bytes of the file."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from wanda_lightning.arguments import number_not_below_0, plain

Kind = Literal["increase", "drop", "rise", "bytes"]
PERPLEXITY, BYTES = "perplexity", "bytes"
SURE = 2.0  # differences within so many standard errors are called noise


@dataclass(frozen=True)
class Budget:
    """How far a metric may move from where the dense model has it; or how many bytes the model may take.

    Args:
        metric: Its name, or the end of it.
        kind: ``increase``, by a fraction of the dense value; ``drop`` or ``rise``, by so much; ``bytes``, in all.
        most: How far, or how many; at least 0.
    """

    metric: str
    kind: Kind
    most: float

    def __str__(self) -> str:
        if self.kind == "bytes":
            return f"at most {self.most:,.0f} bytes"
        if self.kind == "increase":
            return f"{self.metric} at most {100 * self.most:g} % over the dense model's"
        return f"{self.metric} at most {self.most:g} {'below' if self.kind == 'drop' else 'over'} the dense model's"

    @property
    def is_of_size(self) -> bool:
        """Whether less is spent the sparser the model is."""
        return self.kind == "bytes"

    @property
    def measured_on(self) -> str:
        """What the metric of a trial is of."""
        return "of the compressed weights" if self.is_of_size else "on the held-out windows"

    @property
    def limit(self) -> float:
        """The largest :meth:`cost` within the budget."""
        return math.log1p(self.most) if self.kind == "increase" else self.most

    def cost(self, dense: Mapping[str, float], metrics: Mapping[str, float]) -> float:
        """Return how far the metric has moved for the worse, of an increase the logarithm; or the bytes."""
        before, now = self.value(dense), self.value(metrics)
        if self.kind == "increase":
            return math.log(now / before)
        return now if self.kind == "bytes" else before - now if self.kind == "drop" else now - before

    def level(self, dense: Mapping[str, float]) -> float:
        """Return the value of the metric at which the budget is used up."""
        before = self.value(dense)
        if self.kind == "increase":
            return before * (1 + self.most)
        return self.most if self.kind == "bytes" else before - self.most if self.kind == "drop" else before + self.most

    def change(self, dense: Mapping[str, float], metrics: Mapping[str, float]) -> str:
        """Write how far the metric has moved."""
        return self.moved(self.value(dense), self.value(metrics))

    def moved(self, before: float, now: float) -> str:
        """Write how far a value has moved: perplexities and bytes by a fraction, others, which may be 0, by so much."""
        return f"{now / before - 1:+.2%}" if self.kind in ("increase", "bytes") else f"{now - before:+.4g}"

    def is_noise(self, difference: float, dense: Mapping[str, float], metrics: Mapping[str, float]) -> bool:
        """Whether a difference of two values is within twice its standard error; never where none is logged.

        The errors are added as those of samples drawn apart. Both values are of the same samples, so the true error of
        their difference is smaller: what is not called noise here is none.
        """
        error = f"{self.name(metrics)}_stderr"
        if error not in metrics or error not in dense:
            return False
        return abs(difference) <= SURE * math.hypot(dense[error], metrics[error])

    def value(self, metrics: Mapping[str, float]) -> float:
        """Find the metric among others."""
        return metrics[self.name(metrics)]

    def name(self, metrics: Mapping[str, float]) -> str:
        """Find the name under which the metric was logged.

        Args:
            metrics: What a validation logged.

        Returns:
            The name.

        Raises:
            ValueError: If it was not logged.
        """
        return whole_name(self.metric, metrics, f"no metric {self.metric!r} was logged", "there are")


def whole_name(metric: str, names: Collection[str], unknown: str, listed: str) -> str:
    """Find the metric that is meant by its name, or by the end of it if no other ends so.

    Args:
        metric: What the user says.
        names: The metrics that there are.
        unknown: What to say if it is none of them.
        listed: What stands before their names then.

    Returns:
        Its name.

    Raises:
        ValueError: If it is none of them, or several end so.
    """
    found = [name for name in names if f"/{name}".endswith(f"/{metric}")]
    if metric in found or len(found) == 1:
        return metric if metric in found else found[0]
    said = f"{len(found)} metrics end in {metric!r}" if found else unknown
    raise ValueError(f"{said}; {listed} {', '.join(names) or 'none'}")


def budget_of(
    max_perplexity_increase: float | None = None,
    max_bytes: float | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    max_rise: float | None = None,
) -> Budget:
    """Read a budget as users give it; see :meth:`PruningTrainer.search`.

    Args:
        max_perplexity_increase: By which fraction of the dense value the perplexity may be higher.
        max_bytes: How large the compressed weights may be.
        metric: Another metric.
        max_drop: How much lower it may be.
        max_rise: How much higher it may be.

    Returns:
        The budget.

    Raises:
        ValueError: If there is no budget or more than one, or it is negative, infinite or no number.
    """
    given: dict[Kind, float | None] = {
        "increase": max_perplexity_increase, "bytes": max_bytes, "drop": max_drop, "rise": max_rise,
    }  # fmt: skip
    found = [(kind, most) for kind, most in given.items() if most is not None]
    if len(found) != 1 or (metric is None) == (found[0][0] in ("drop", "rise")):
        asked = {"max_perplexity_increase": max_perplexity_increase, "max_bytes": max_bytes, "metric": metric,
                 "max_drop": max_drop, "max_rise": max_rise}  # fmt: skip
        raise ValueError(
            "a search needs one budget: max_perplexity_increase, max_bytes, or metric with max_drop or max_rise; got "
            + (", ".join(f"{name}={value}" for name, value in asked.items() if value is not None) or "none")
        )
    ((kind, most),) = found
    most = plain(most)
    number_not_below_0("a budget", most)
    return Budget(metric or (BYTES if kind == "bytes" else PERPLEXITY), kind, most)
