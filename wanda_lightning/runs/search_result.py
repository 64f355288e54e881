"""What a search found: every sparsity that was tried, the budget, and the model that came of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wanda_lightning.atomic_files import write_text
from wanda_lightning.json_files import write_json
from wanda_lightning.report.tables import markdown_table, terminal_table, with_errors
from wanda_lightning.runs.budget import Budget

Metrics = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One sparsity that was tried.

    Attributes:
        sparsity: What was asked for.
        zeros: Fraction of zeros in the pruned linears.
        metrics: What the validation on the held-out windows gave.
    """

    sparsity: float
    zeros: float
    metrics: Metrics


@dataclass
class SearchResult:
    """The course of a search, and its end.

    Attributes:
        budget: What was to be kept to.
        settings: What the figures of the trials depend on.
        dense: Metrics of the dense model on the held-out windows.
        trials: The trials, in the order in which they were made.
        found: The largest sparsity within the budget; None while the search goes on.
        final: Metrics of the model before and after it was pruned to that, on the windows that chose nothing.
    """

    budget: Budget
    settings: dict[str, dict[str, Any]]
    dense: Metrics = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    found: float | None = None
    final: dict[str, Metrics] = field(default_factory=dict)

    def __repr__(self) -> str:
        found = None if self.found is None else self.trial(self.found)
        said = self.describe(found) if found else f"nothing found yet; the budget is {self.budget}"
        return f"{said}; trials: {len(self.trials)}"

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "SearchResult":
        """Undo :meth:`to_dict`."""
        trials = [Trial(**trial) for trial in plain["trials"]]
        return cls(**{**plain, "budget": Budget(**plain["budget"]), "trials": trials})

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        return asdict(self)

    def curve(self) -> list[Trial]:
        """Return the dense model and the trials, by sparsity."""
        return sorted([Trial(0.0, 0.0, self.dense), *self.trials], key=lambda trial: trial.sparsity)

    def trial(self, sparsity: float) -> Trial | None:
        """Return the trial of a sparsity, if there is one."""
        return next((trial for trial in self.curve() if trial.sparsity == sparsity), None)

    def describe(self, trial: Trial) -> str:
        """Say in a line what a trial gave, and what the budget is."""
        return f"{self._figures(trial)}; the budget is {self.budget}"

    def _figures(self, trial: Trial) -> str:
        budget = self.budget
        value, change = budget.value(trial.metrics), budget.change(self.dense, trial.metrics)
        name, figure = budget.name(trial.metrics), f"{value:,.0f}" if budget.is_of_size else f"{value:.4g}"
        return f"{percent(trial.sparsity)}, with {name} {figure} ({change}) {budget.measured_on}"

    def is_kept(self, trial: Trial) -> bool:
        """Whether a trial is within the budget."""
        return self.budget.cost(self.dense, trial.metrics) <= self.budget.limit

    def may_be_noise(self, trial: Trial) -> bool:
        """Whether the metric is so near to the budget that its standard error leaves open if that is kept."""
        difference = self.budget.value(trial.metrics) - self.budget.level(self.dense)
        return self.budget.is_noise(difference, self.dense, trial.metrics)

    def notes(self) -> list[str]:
        """Say what was found, what it costs on windows that chose nothing, and what of it may be noise."""
        budget, curve, notes = self.budget, self.curve(), []
        if self.found is not None and (trial := self.trial(self.found)):
            best = "smallest" if budget.is_of_size else "largest"
            notes.append(f"the {best} sparsity found within the budget, {budget}: {self._figures(trial)}")
            difference = budget.value(trial.metrics) - budget.value(self.dense)
            if budget.is_noise(difference, self.dense, trial.metrics):
                notes.append("its difference from the dense model is within twice the standard error: it may be noise")
        if unsure := [percent(trial.sparsity) for trial in curve[1:] if self.may_be_noise(trial)]:
            notes.append(
                f"whether the budget is kept at {', '.join(unsure)} may be noise: the distance to it is within twice "
                "the standard error"
            )
        costs = [budget.cost(self.dense, trial.metrics) for trial in curve]
        if not budget.is_of_size and any(costs[at + 1] < costs[at] for at in range(len(costs) - 1)):
            notes.append("the metric gets better again somewhere: a larger sparsity may be within the budget too")
        return notes + self._notes_on_the_end()

    def _notes_on_the_end(self) -> list[str]:
        if len(self.final) < 2:
            return []
        before, *_, after = self.final.values()
        name = "val/perplexity" if self.budget.is_of_size else self.budget.name(self.dense)
        names = [each for each in before if each.startswith(name) and not each.endswith("_stderr") and each in after]
        if "zero_shot/" in name:
            return [f"{name} in the report flatters the pruned model: the same questions chose its sparsity"]
        figures = [
            f"{each.removeprefix('val/')} {before[each]:.4g} dense, {after[each]:.4g} pruned "
            f"({self.budget.moved(before[each], after[each])})"
            for each in names
        ]
        is_judged = names == [name] and not self.budget.is_of_size
        end = ", over the budget" if is_judged and self.budget.cost(before, after) > self.budget.limit else ""
        return [f"on the evaluation set, which chose nothing: {'; '.join(figures)}{end}"] if figures else []

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows, as text."""
        name, rows = self.budget.name(self.dense), []
        for trial in self.curve():
            written = f"{trial.metrics[name]:,.0f}" if self.budget.is_of_size else with_errors(trial.metrics)[name]
            if trial.metrics is self.dense:
                rows.append([percent(0), "", written, "", "dense"])
                continue
            words = ["kept" if self.is_kept(trial) else "broken"]
            words += ["perhaps by noise"] * self.may_be_noise(trial) + ["found"] * (trial.sparsity == self.found)
            change = self.budget.change(self.dense, trial.metrics)
            rows.append([percent(trial.sparsity), percent(trial.zeros), written, change, ", ".join(words)])
        return ["sparsity", "zeros", name.removeprefix("val/"), "change", "budget"], rows

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        notes = [f"\nNote: {note}." for note in self.notes()]
        return "\n".join([*markdown_table(*self.table(), left=(4,)), *notes]) + "\n"

    def to_table(self) -> Any:
        """Return the table for a rich console."""
        from rich.console import Group
        from rich.text import Text

        return Group(terminal_table(*self.table(), left=(4,)), *(Text(f"Note: {note}.") for note in self.notes()))

    def save(self, folder: str | Path) -> None:
        """Write ``search.json`` and ``search.md`` into a folder."""
        write_json(Path(folder) / "search.json", self.to_dict())
        write_text(Path(folder) / "search.md", self.to_markdown())


def percent(sparsity: float) -> str:
    """Write a sparsity."""
    return f"{100 * sparsity:.4g} %"
