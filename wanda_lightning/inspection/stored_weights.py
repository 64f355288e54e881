"""The weights in a model's folder: how sparse they are and in which pattern, and whether they load.

Files are read tensor by tensor, so the model need not fit into memory. Shapes: O out features, I in features.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from wanda_lightning.checkpoints.tensor_files import COMPRESSED, opened, weight_files
from wanda_lightning.inspection.load_check import LoadCheck, load_check
from wanda_lightning.inspection.stored_linears import MatrixFinder, StoredLinear, measure
from wanda_lightning.json_files import read_json
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.report.pruning_report import REPORT, PruningReport
from wanda_lightning.report.tables import Table, terminal_table
from wanda_lightning.sparsity import Pattern, SemiStructured, parse_pattern

COMMON = [SemiStructured(n, m) for n, m in ((1, 4), (2, 8), (1, 2), (2, 4), (4, 8), (3, 4), (6, 8))]
log = logging.getLogger(__name__)

SHOWN = 12
"""So many names of linears are shown; the attributes hold all."""


@dataclass(frozen=True)
class StoredWeights:
    """The weights in the files of a folder.

    Attributes:
        files: How many there are.
        nbytes: Their size together.
        linears: The prunable matrices.
        check: Whether transformers loads them.
        report: The report of the pruning, if it lies beside the weights.
        card: Title of the model card, if a pruning wrote it.
    """

    files: int
    nbytes: int
    linears: list[StoredLinear]
    check: LoadCheck
    report: PruningReport | None
    card: str | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all prunable matrices."""
        return _sparsity(self.linears)

    @property
    def pattern(self) -> str | None:
        """The tightest N:M pattern that more than half of the linears keep to; None if there is none."""
        holds = Counter(pattern for linear in self.linears for pattern in linear.patterns)
        common = [parse_pattern(pattern) for pattern, number in holds.items() if 2 * number > len(self.linears)]
        return str(min(common, key=_tightness)) if common else None

    @property
    def exceptions(self) -> list[StoredLinear]:
        """Linears that do not keep to :attr:`pattern`."""
        pattern = self.pattern  # which looks at all of them
        return [linear for linear in self.linears if pattern and pattern not in linear.patterns]

    @property
    def contradictions(self) -> list[str]:
        """Linears that have fewer zeros than the report says."""
        reported = {row.name: row.sparsity for row in self.report.linears} if self.report else {}
        return [str(x) for x in self.linears if x.sparsity < reported.get(x.name, 0) - 0.001]

    @property
    def summary(self) -> str:
        """One sentence of totals."""
        return f"{self.sparsity:.2%} of the weights of {len(self.linears)} prunable matrices are zero."

    def __repr__(self) -> str:
        return self.summary

    def to_table(self) -> Any:
        """Return findings for a rich console, and a table where there is anything to show in it."""
        from rich.console import Group

        pruned = any(linear.sparsity >= 0.01 for linear in self.linears)
        return Group(*([terminal_table(*self.by_layer_and_kind())] if pruned else []), *self._findings())

    def by_layer_and_kind(self) -> Table:
        """Tabulate the sparsity; consecutive layers that read the same share a row."""
        kinds = list(dict.fromkeys(linear.kind for linear in self.linears))
        short = [kind.removesuffix(".*").rpartition(".")[2] for kind in kinds]
        rows: list[list[str]] = []
        first = 0
        for layer in sorted({linear.layer for linear in self.linears}):
            here = [linear for linear in self.linears if linear.layer == layer]
            groups = [here, *([linear for linear in here if linear.kind == kind] for kind in kinds)]
            cells = [f"{_sparsity(group):.1%}" if group else "" for group in groups]
            if rows and rows[-1][1:] == cells:
                rows[-1][0] = f"{first} to {layer}"
            else:
                first = layer
                rows.append([f"{layer}", *cells])
        return ["zeros in layer", "all", *(short if len(set(short)) == len(short) else kinds)], rows

    def _findings(self) -> Iterator[str]:
        from rich.markup import escape

        yield self.summary
        if not self.linears:
            yield "[red]None was found[/red]: the files have other names for them than the model."
        elif self.pattern is None:
            yield "They keep to no n:m pattern."
        elif not self.exceptions:
            yield f"Every one of them is {self.pattern}: in each group of inputs no more weights are kept."
        else:
            yield f"{self.pattern}, [yellow]but for {len(self.exceptions)}[/yellow]: {_some(map(str, self.exceptions))}"
        if self.report is not None:
            yield f"The report beside them says: {escape(self.report.title)}."
            for stage, metrics in self.report.evaluations.items():
                yield f"  {stage}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            if self.contradictions:
                yield f"[red]Fewer zeros than reported[/red] in {_some(self.contradictions)}"
        elif self.card:
            yield f"The model card says: {escape(self.card)}."
        where = f"{self.files} file{'s' if self.files > 1 else ''}, {self.nbytes / 1e6:,.1f} MB"
        if self.check.loads_whole:
            yield f"Loads with transformers: every weight is there, of the right shape ({where})."
        else:
            yield f"[red]Does not load whole[/red] with transformers ({where})."
        if not self.check.fits_together:
            yield "  Matrices that the model fuses, such as those of experts, are missing or of different shapes."
        for what in ("missing", "mismatched", "unused"):
            if names := getattr(self.check, what):
                yield f"  {len(names)} {what}: {_some(names)}"


def stored_weights(folder: Path, model: nn.Module, layers: Sequence[DecoderLayer]) -> StoredWeights | None:
    """Look at the safetensors weights of a model.

    Args:
        folder: The model's folder.
        model: The model that its config describes, on the meta device.
        layers: Its decoder layers.

    Returns:
        What was found; None if the folder has no such weights.

    Raises:
        ValueError: If a file is missing or cut off.
    """
    from rich.progress import track

    files = weight_files(folder)
    if not files:
        if others := sorted(file.name for file in folder.iterdir() if file.name.endswith((".bin", COMPRESSED))):
            log.warning("only weights in *.safetensors that transformers loads are looked at, not %s", _some(others))
        return None
    shapes: dict[str, list[int]] = {}
    for file in files:
        with opened(file) as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    report = _report(folder)
    find, patterns = MatrixFinder(model, layers), _candidates(report)
    linears = []
    for file in track(files, "Reading weights", transient=True, disable=len(files) == 1):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if len(shapes[name]) >= 2 and (place := find.place(name)):
                    for matrix, weight_OI in find.matrices(name, place, tensors.get_tensor(name)):
                        linears.append(measure(matrix, place, weight_OI, patterns))
    linears.sort(key=lambda linear: linear.layer)
    size = sum(file.stat().st_size for file in files)
    return StoredWeights(len(files), size, linears, load_check(model, shapes), report, _card_title(folder))


def _candidates(report: PruningReport | None) -> list[SemiStructured]:
    """List the patterns to look for, the tightest first: the common ones, and the one that was asked for."""
    asked = []
    with suppress(ValueError):
        asked = [parse_pattern(report.pattern)] if report else []
    return sorted({*COMMON, *(p for p in asked if isinstance(p, SemiStructured))}, key=_tightness)


def _tightness(pattern: Pattern) -> tuple[float, int]:
    """Rank patterns: those that keep less come first, then those of smaller groups."""
    return -pattern.sparsity, pattern.m if isinstance(pattern, SemiStructured) else 0


def _report(folder: Path) -> PruningReport | None:
    """Read the report of the run that saved a model: in its folder, or beside ``model/`` where the Trainer puts it."""
    folder = folder.resolve()
    for beside in (folder, *([folder.parent] if folder.name == "model" else [])):
        if (beside / REPORT).is_file():
            try:
                return PruningReport.from_dict(read_json(beside / REPORT))
            except (ValueError, KeyError, TypeError) as error:
                log.warning("%s is no report of a pruning: %r", beside / REPORT, error)
    return None


def _card_title(folder: Path) -> str | None:
    """Read the title of a model card, if it is one of a pruned model."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    header = re.match(r"---\n(.*?)\n---\n\s*# (.+?)\n", text, re.DOTALL)
    return header[2] if header and "- pruned" in header[1].splitlines() else None


def _sparsity(linears: Sequence[StoredLinear]) -> float:
    return sum(x.zeros for x in linears) / max(1, sum(x.shape[0] * x.shape[1] for x in linears))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
