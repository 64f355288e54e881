"""``wanda-lightning compare RUN RUN ...``: what several runs gave, as one table and one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanda_lightning.arguments import several
from wanda_lightning.atomic_files import write_text
from wanda_lightning.json_files import read_json, write_json
from wanda_lightning.report.pruning_report import REPORT, name_of_model
from wanda_lightning.report.shrinking import SHRINKING, Shrinking
from wanda_lightning.report.tables import markdown_table, terminal_table, with_errors
from wanda_lightning.report.titles import title_of

EVALUATED = "evaluated tokens"
TASK_SETTINGS = {f"zero-shot {name}": name for name in ("limit", "num_fewshot", "max_length", "add_special_tokens")}
DATA = ("sequence_length", "evaluation", EVALUATED, *TASK_SETTINGS, "source", "num_samples")
"""What figures depend on, of the data."""
TEXT = (0, 1, 3)
"""The columns of the table that hold words."""


@dataclass(frozen=True)
class Run:
    """One run, as its ``pruning.json`` describes it.

    Attributes:
        folder: The run's folder.
        method: The method and its settings.
        pattern: ``unstructured`` or ``n:m``.
        sparsity: Fraction of zeros in the pruned linears.
        evaluations: Metrics by stage, such as dense, pruned and fine-tuned.
        data: What it was calibrated and evaluated on.
        model: Which model was pruned, and its size; empty in reports of older versions.
        allocation: What split the sparsity among linears; empty where nothing did.
    """

    folder: Path
    method: str
    pattern: str
    sparsity: float
    evaluations: dict[str, dict[str, float]]
    data: dict[str, Any]
    model: str = ""
    allocation: str = ""


class Comparison:
    """Several runs side by side.

    Args:
        folders: Folders that hold a ``pruning.json``, or such files; a folder of runs, as of a sweep, is all of them.

    Raises:
        ValueError: If there is no run, or a folder holds none that can be read.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        several("folders", folders)
        if not folders:
            raise ValueError("nothing to compare: name the folders of one or more runs")
        self.runs = [_read(run) for folder in folders for run in _runs_in(Path(folder))]

    def label(self, run: Run) -> str:
        """Name a run's method: with its model and data where others have other ones, else its folder if need be."""
        named = ", ".join(filter(None, (title_of(run.method), title_of(run.allocation), self.distinction(run))))
        alike = [r for r in self.runs if _asked(r) == _asked(run) and self.distinction(r) == self.distinction(run)]
        names = [r.folder.resolve().name for r in alike]  # also where one is named as "."
        name = run.folder.resolve().name
        return named if len(alike) == 1 else f"{named} in {name if names.count(name) == 1 else run.folder}"

    def distinction(self, run: Run) -> str:
        """Say what tells a run's model and data from those of others; empty where all have the same."""
        model = [Path(run.model.partition(", ")[0]).name] if len(self.models()) > 1 else []
        data = [f"{what} {Path(str(run.data[what])).name}" for what in self._differing() if what in run.data]
        return ", ".join(model + data)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each stage of each run; dense results that do not contradict each other are one row."""
        rows: list[dict[str, Any]] = []
        dense: list[tuple[str, dict[str, float]]] = []
        for run in self.runs:
            for stage, metrics in run.evaluations.items():
                shown = {key: value for key, value in metrics.items() if key != "sparsity"}
                if stage == "dense":
                    of = self.distinction(run)
                    if same := [known for other, known in dense if other == of and known | shown == shown | known]:
                        same[0].update(shown)
                        continue
                    dense.append((of, shown))
                is_dense = stage in ("dense", "as loaded")
                rows.append(
                    {
                        "run": "" if is_dense and len(self.runs) > 1 else str(run.folder),
                        "method": "" if is_dense else self.label(run),
                        "of": self.distinction(run),
                        "pattern": "" if is_dense else run.pattern,
                        "sparsity": metrics.get("sparsity", 0.0 if is_dense else run.sparsity),
                        "stage": stage,
                        "metrics": shown,
                    }
                )
        return sorted(rows, key=lambda row: row["stage"] != "dense")  # the others stay in the order given

    def models(self) -> list[str]:
        """Return which models the runs are of, as far as the reports say."""
        return sorted({run.model for run in self.runs if run.model})

    def notes(self) -> list[str]:
        """Name the model, and say what keeps the figures from being comparable."""
        models = self.models()
        named = [f"the model is {models[0]}"] if len(models) == 1 else []
        if len(models) > 1:
            named = [f"the runs are of different models, so their figures do not compare: {'; '.join(models)}"]
        return named + [
            f"the runs differ in {what}, so their figures do not compare: {', '.join(map(str, sorted(found, key=str)))}"
            for what, found in self._differing().items()
        ]

    def _differing(self) -> dict[str, set[Any]]:
        """Return the settings of the data that are not the same in all runs, with their values."""
        values = {what: {run.data[what] for run in self.runs if what in run.data} for what in DATA}
        return {what: found for what, found in values.items() if len(found) > 1}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows, as text."""
        rows = self.rows()
        written = [with_errors(row["metrics"]) for row in rows]
        metrics = list(dict.fromkeys(name for each in written for name in each))
        header = ["method", "pattern", "sparsity", "stage", *(name.removeprefix("val/") for name in metrics)]
        return header, [
            [row["method"], row["pattern"], f"{row['sparsity']:.2%}", row["stage"], *(each.get(m, "") for m in metrics)]
            for row, each in zip(rows, written, strict=True)
        ]

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        header, rows = self.table()
        return (
            "\n".join([*markdown_table(header, rows, left=TEXT), *(f"\nNote: {note}." for note in self.notes())]) + "\n"
        )

    __str__ = to_markdown

    def __repr__(self) -> str:
        return "runs: " + "; ".join(dict.fromkeys(map(self.label, self.runs)))

    def to_table(self) -> Any:
        """Return the table for a rich console."""
        from rich.console import Group
        from rich.text import Text

        notes = [Text(f"Note: {note}.", style="yellow") for note in self.notes()]
        return Group(terminal_table(*self.table(), left=TEXT), *notes)

    def save(self, folder: str | Path) -> None:
        """Write ``comparison.md`` and ``comparison.json`` into a folder."""
        plain = {"notes": self.notes(), "rows": self.rows()}
        write_text(Path(folder) / "comparison.md", self.to_markdown())
        write_json(Path(folder) / "comparison.json", plain)


def _asked(run: Run) -> tuple[object, ...]:
    return run.method, run.allocation, run.pattern, run.sparsity


def _runs_in(folder: Path) -> list[Path]:
    """List the runs in a folder; where it is a run itself, or there are none, the folder."""
    reports = [file for name in (REPORT, SHRINKING) for file in folder.glob(f"*/{name}")]
    is_run = any((folder / name).exists() for name in (REPORT, SHRINKING))
    return [folder] if is_run or not reports else sorted({file.parent for file in reports})


def _read(folder: Path) -> Run:
    file = folder / REPORT if folder.is_dir() else folder
    if folder.is_dir() and not file.exists() and (folder / SHRINKING).exists():
        file = folder / SHRINKING
    try:
        plain = read_json(file)
        if file.name == SHRINKING:
            plain = _as_of_a_pruning(Shrinking.from_dict(plain))
        return Run(
            folder if folder.is_dir() else folder.parent,
            plain["method"],
            plain["pattern"],
            plain["sparsity"],
            plain["evaluations"],
            plain["calibration"] | _evaluated(plain["evaluations"]) | _tasks_asked(file.parent, plain["evaluations"]),
            name_of_model(plain.get("model") or {}),
            (plain.get("allocation") or {}).get("allocator", ""),
        )
    except OSError as error:
        raise ValueError(f"{folder} is no finished run: it holds no {REPORT} that can be read") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report of a pruning: {error!r}") from error


def _evaluated(evaluations: dict[str, dict[str, float]]) -> dict[str, str]:
    """Say on how many tokens a run was evaluated; reports of older versions, and of other modules, do not tell."""
    counts = [value for stage in evaluations.values() for name, value in stage.items() if name.startswith("val/tokens")]
    return {EVALUATED: " and ".join(dict.fromkeys(f"{count:,.0f}" for count in counts))} if counts else {}


def _tasks_asked(folder: Path, evaluations: dict[str, dict[str, float]]) -> dict[str, str]:
    """Say how a run was asked zero-shot tasks, as lm-eval's results beside its report have it."""
    stages = [stage for stage, metrics in evaluations.items() if any("zero_shot/" in name for name in metrics)]
    files = [file for stage in stages if (file := folder / f"zero_shot/{stage}.json").exists()]
    settings = [read_json(file)["settings"] for file in files]
    return {
        what: " and ".join(dict.fromkeys(str(each[name]) for each in settings))
        for what, name in TASK_SETTINGS.items()
        if settings
    }


def _as_of_a_pruning(shrinking: Shrinking) -> dict[str, Any]:
    """Describe a run that only made its model smaller as one that pruned no weight to zero."""
    return {
        "method": shrinking.title,
        "pattern": "dense",
        "sparsity": 0.0,
        "evaluations": shrinking.evaluations,
        "calibration": shrinking.calibration,
        "model": shrinking.model | {"parameters": shrinking.parameters[0]},
    }
