"""What a pruning did, linear by linear, as JSON, Markdown and a table on the terminal."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_lightning.atomic_files import write_text
from wanda_lightning.json_files import write_json
from wanda_lightning.report.allotment import Allotment
from wanda_lightning.report.environment import environment
from wanda_lightning.report.html.notebook import to_notebook
from wanda_lightning.report.html.page import to_html
from wanda_lightning.report.layer_reconstruction import LayerReconstruction, reconstruction_table
from wanda_lightning.report.linear_report import ERROR, LinearReport, mean_error, mean_sparsity
from wanda_lightning.report.on_terminal import to_table
from wanda_lightning.report.samples import samples_table
from wanda_lightning.report.tables import Table, evaluation_table, in_bytes, markdown_table
from wanda_lightning.report.titles import title_of
from wanda_lightning.report.weight_magnitudes import Magnitudes

if TYPE_CHECKING:
    from rich.console import Group

REPORT = "pruning.json"
"""The file that a report is written to and read from."""
REPORT_FILES = (REPORT, "pruning.md", "report.html")
"""All the files that it is written to: for programs, as Markdown, and as a page."""


@dataclass
class PruningReport:
    """Everything that is worth knowing about one pruning and the evaluations around it.

    Attributes:
        method: The method and its settings, such as ``"Wanda(variant=False)"``.
        pattern: ``"unstructured"`` or ``"n:m"``.
        target_sparsity: The fraction asked for.
        model: Which model: its ``name`` or path as given, ``revision`` if one was, number of ``parameters``, ``dtype``.
        settings: What was asked for, to know the same run again.
        linears: A row for each pruned linear.
        allocation: How the sparsity was split by an allocator; None where it was not.
        matches: How many linears each name pattern of targets, ignore and allocation fits.
        not_pruned: Linears of the decoder left dense, by name with the reason.
        whole_model_sparsity: Zeros over all parameters, embeddings and norms included.
        seconds: Time of the whole pruning.
        seconds_by_phase: How that time was spent, such as ``{"forward": 9.0, "statistics": 2.0, "solve": 4.0}``.
        memory: Bytes, such as ``{"peak process memory": 2147483648}``; see
            :func:`wanda_lightning.report.environment.peak_memory`.
        reconstruction: By decoder layer, the errors of its output before and after what was kept was trained.
        magnitudes: How large the kept and the pruned weights were, by kind of linear.
        calibration: Where the calibration set came from.
        evaluations: Metrics by stage, such as ``{"dense": {"val/perplexity": 29.3}}``.
        samples: How the model continued texts, by stage: ``{"dense": {"The capital of France is": " Paris."}}``.
        training: Steps and losses of the training after the pruning.
        environment: Versions, machine and date.
    """

    method: str
    pattern: str
    target_sparsity: float
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    linears: list[LinearReport] = field(default_factory=list)
    allocation: Allotment | None = None
    matches: dict[str, int] = field(default_factory=dict)
    not_pruned: dict[str, str] = field(default_factory=dict)
    whole_model_sparsity: float = 0.0
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    reconstruction: dict[str, LayerReconstruction] = field(default_factory=dict)
    magnitudes: dict[str, Magnitudes] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    training: list[tuple[int, float]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=environment)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned linears."""
        return mean_sparsity(self.linears)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types, the totals first."""
        plain = asdict(self)
        rows = plain.pop("linears")
        head = {key: plain.pop(key) for key in ("method", "pattern", "target_sparsity")}
        return {**head, "sparsity": self.sparsity, **plain, "linears": rows}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "PruningReport":
        """Read back what :meth:`to_dict` gave."""
        rows = [LinearReport.from_dict(row) for row in plain["linears"]]
        magnitudes = {kind: Magnitudes.from_dict(counts) for kind, counts in plain.get("magnitudes", {}).items()}
        trained = {name: LayerReconstruction(**values) for name, values in plain.get("reconstruction", {}).items()}
        rest = {key: value for key, value in plain.items() if key != "sparsity"}
        split = plain.get("allocation")
        rest |= {"allocation": Allotment(**split) if split else None}
        return cls(**rest | {"linears": rows, "magnitudes": magnitudes, "reconstruction": trained})

    def to_markdown(self) -> str:
        """Return the tables as Markdown."""
        lines = [f"# {self.title}", "", *([f"Model: {self.model_name}.", ""] if self.model else []), self.summary, ""]
        lines += [f"Allocation: {self.allocation}.", ""] if self.allocation else []
        for header, rows in self.tables():
            lines += [*markdown_table(header, rows), ""]
        lines += [ERROR, ""] if mean_error(self.linears) is not None else []
        return "\n".join(lines)

    def to_table(self, details: bool = True) -> "Group":
        """Return the tables for a rich console, the most wanted last, where the eye is.

        Args:
            details: Whether to show all; else the evaluations, and how texts are continued.

        Returns:
            What rich can print.
        """
        return to_table(self, details)

    def __repr__(self) -> str:
        return f"{self.title}: {self.summary}"

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        return to_notebook(self)

    def save(self, folder: str | Path) -> None:
        """Write ``pruning.json``, ``pruning.md`` and ``report.html`` into a folder."""
        plain, markdown, page = (Path(folder) / name for name in REPORT_FILES)
        write_json(plain, self.to_dict())
        write_text(markdown, self.to_markdown())
        write_text(page, to_html(self))

    @property
    def title(self) -> str:
        """The method and what it was asked for."""
        return f"{title_of(self.method)}, {self.pattern}, sparsity {self.target_sparsity:g}"

    @property
    def model_name(self) -> str:
        """The model, its revision and its size, in a few words; empty where a report of an older version lacks it."""
        return name_of_model(self.model)

    @property
    def summary(self) -> str:
        """One sentence of totals."""
        took = f", pruned in {self.seconds:.1f} s" if self.seconds else ""  # zeros that were found took no time
        return (
            f"{self.sparsity:.2%} of the weights of {len(self.linears)} linears are zero "
            f"({self.whole_model_sparsity:.2%} of the whole model){took}."
        )

    @property
    def order(self) -> str:
        """How often the calibration set ran through the layers: ``one pass; two in 3 of 30 layers``; empty without."""
        passes = {row.layer: row.passes for row in self.linears if row.passes is not None}
        twice = sum(number > 1 for number in passes.values())
        if not passes or twice == len(passes):
            return "two passes" if passes else ""
        return "one pass" + (f"; two in {twice} of {len(passes)} layers" if twice else "")

    def evaluation_table(self) -> Table | None:
        """Return the metrics by stage; None if the model was not evaluated."""
        return evaluation_table(self.evaluations)

    def overview(self) -> Iterable[Table]:
        """Yield the tables that are not by layer."""
        if evaluation := self.evaluation_table():
            yield evaluation
        if samples := samples_table(self.samples):
            yield samples
        if self.matches:
            yield ["name pattern", "linears"], [[pattern, str(count)] for pattern, count in self.matches.items()]
        if self.not_pruned:
            reasons = Counter(self.not_pruned.values())
            yield ["not pruned, because", "matrices"], [[why, str(number)] for why, number in reasons.items()]

    def add(self, done: Iterable[tuple[LinearReport, Magnitudes]]) -> None:
        """Add the rows of pruned linears, and how large their weights were, by kind of linear."""
        for row, magnitudes in done:
            self.linears.append(row)
            self.magnitudes.setdefault(row.kind, Magnitudes()).add(magnitudes)

    def repeat(self, repeats: Iterable[tuple[str, str, str]]) -> None:
        """Add rows of linears whose matrix another linear has: their name, their layer, and that other linear."""
        rows = {row.name: row for row in self.linears}
        self.linears += [
            replace(rows[first], name=name, layer=layer, seconds=0.0, same_as=first)
            for name, layer, first in repeats
            if first in rows
        ]

    def costs(self) -> dict[str, float]:
        """Return seconds by phase; what is left of the whole time comes last, as ``"other"``."""
        other = self.seconds - sum(self.seconds_by_phase.values())
        return {**self.seconds_by_phase, **({"other": max(0.0, other)} if self.seconds_by_phase else {})}

    def tables(self) -> Iterable[Table]:
        """Yield all tables."""
        yield from self.overview()
        costs = [["order", self.order]] if self.order else []
        costs += [[f"seconds: {phase}", f"{seconds:.2f}"] for phase, seconds in self.costs().items()]
        costs += [[name, in_bytes(size)] for name, size in self.memory.items()]
        if costs:
            yield ["time and memory", ""], costs
        if self.reconstruction:
            yield reconstruction_table(self.reconstruction)
        yield _layer_table(self.linears, self.allocation)


def name_of_model(model: Mapping[str, Any]) -> str:
    """Write what a report knows of its model: ``name at revision, 1,234 parameters``."""
    name = str(model.get("name", ""))
    revision = f" at {model['revision']}" if model.get("revision") else ""
    parameters = f", {model['parameters']:,} parameters" if "parameters" in model else ""
    return f"{name}{revision}{parameters}"


def _layer_table(linears: Iterable[LinearReport], allocation: Allotment | None) -> Table:
    layers: dict[str, list[LinearReport]] = {}
    for row in linears:
        layers.setdefault(row.layer, []).append(row)
    why = allocation if allocation and allocation.figure else None
    return (
        ["layer", "linears", "weights", "sparsity", *([why.figure] if why else []), "error", "seconds"],
        [
            [
                name,
                str(len(rows)),
                f"{sum(row.shape[0] * row.shape[1] for row in rows):,}",
                f"{mean_sparsity(rows):.2%}",
                *([f"{why.reason(rows) or 0:.3g}"] if why else []),
                _show_error(rows),
                f"{sum(row.seconds for row in rows):.2f}",
            ]
            for name, rows in layers.items()
        ],
    )


def _show_error(rows: list[LinearReport]) -> str:
    error = mean_error(rows)
    estimated = any(row.error is not None and not row.error_is_exact for row in rows)
    return "" if error is None else ("~" if estimated else "") + f"{error:.4f}"
