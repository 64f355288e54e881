"""The report of a run: what was pruned, the stages that were evaluated, and where that is written and logged."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from torch import Tensor, nn

from wanda_lightning.callbacks.plumbing.leftovers import remove_search, remove_zero_shot
from wanda_lightning.callbacks.plumbing.report_logging import log_evaluation, log_report, log_totals
from wanda_lightning.callbacks.plumbing.stage import Stage
from wanda_lightning.engine.fingerprint import differences
from wanda_lightning.engine.measured_sparsity import FOUND, Lists, disagreements, has_zeros_at, linears_of, sample_zeros
from wanda_lightning.json_files import read_json
from wanda_lightning.model.names import name_without_adapters
from wanda_lightning.report.loss_curve import Point, add_point, is_wanted
from wanda_lightning.report.pruning_report import REPORT, PruningReport

log = logging.getLogger(__name__)

ADVICE = (
    "Choose another folder (--output on the command line), or say overwrite=True to the pruning callback (--overwrite) "
    "to replace them"
)
"""What to do where results are in the way."""


class RunReport:
    """The report and the evaluations of one run; they belong to its weights, not to the callback that holds them.

    Where the folder holds the results of an earlier run, they stay until this one is through: see :meth:`begin`.

    Attributes:
        report: What was pruned; None before that.
        evaluations: Metrics by stage.
        samples: What the model said, by stage and prompt.
        training: The loss since the pruning, by step.
        trained: How many batches the weights were trained on since they were pruned.
        came_with_zeros: Whether they had zeros of an earlier pruning.
        searched: Whether the run ends a search, so that the files of one in its folder are its own.
        saved: Whether the run has saved its model.
        advice: What to do where results are in the way.
    """

    searched = saved = False
    advice = ADVICE

    def __init__(self) -> None:
        self.report: PruningReport | None = None
        self.evaluations: dict[str, dict[str, float]] = {}
        self.samples: dict[str, dict[str, str]] = {}
        self.training: list[Point] = []
        self.trained, self.came_with_zeros = 0, False
        self._zeros: dict[str, Tensor] = {}  # samples of them, to know the weights again
        self._begun = 0
        self._held: dict[Path, Callable[[], None]] | None = None  # what is to be written in the end
        self._replaced: Path | None = None  # the folder of another run, whose results are to go

    def is_of(self, model: nn.Module, layers: Lists) -> bool:
        """Whether there is a report, and the weights are those that it was made of, trained or not."""
        if self.report is None or disagreements(model, self.report, layers):
            return False
        return has_zeros_at(linears_of(model, self.report, layers), self._zeros)

    def forget(self) -> None:
        """Begin anew, for other weights."""
        self.report, self.evaluations, self.samples, self.training, self._zeros = None, {}, {}, [], {}
        self.trained, self.came_with_zeros = 0, False

    def take(self, report: PruningReport, model: nn.Module, layers: Lists) -> None:
        """Take a new report of a model as it is now."""
        report.linears = [replace(row, name=name_without_adapters(row.name)) for row in report.linears]
        report.magnitudes = {name_without_adapters(kind): counts for kind, counts in report.magnitudes.items()}
        report.evaluations, report.samples, report.training = self.evaluations, self.samples, self.training
        self.report, self._zeros = report, sample_zeros(linears_of(model, report, layers))

    def note_step(self, trainer: Trainer, outputs: Any) -> None:
        """Keep the loss of a training step; Lightning divides it where gradients are accumulated."""
        self.trained += 1
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and is_wanted(self.training, trainer.global_step):
            add_point(self.training, trainer.global_step, float(loss) * trainer.accumulate_grad_batches)

    def add_evaluation(
        self, stage: Stage, metrics: dict[str, float], samples: dict[str, str], trainer: Trainer, folder: Path
    ) -> None:
        """Keep metrics and texts under the stage that the weights are in; if there is a report, log and save them."""
        self.evaluations[stage] = metrics
        if samples:
            self.samples[stage] = samples
        if self.report is not None:
            log_evaluation(self.report, stage, trainer)
            self.save(trainer, folder)

    def publish(self, trainer: Trainer, folder: Path, whole: bool = True) -> None:
        """Log the report and save it in its folder; while a gradual pruning goes on, log only the totals."""
        assert self.report is not None
        (log_report if whole else log_totals)(self.report, trainer)
        self.save(trainer, folder)

    def save(self, trainer: Trainer, folder: Path) -> None:
        """Write the report into its folder."""
        report = self.report
        if report is not None:
            self.write(folder / REPORT, lambda: report.save(folder), trainer)

    def check_folder(self, folder: Path, overwrite: bool = False, **now: dict[str, Any]) -> None:
        """Refuse a folder with results of another model or of other settings.

        Args:
            folder: Folder of the results.
            overwrite: Whether such results are to be replaced.
            now: The ``model``, ``settings`` and ``calibration`` of this run, as far as they are known yet.

        Raises:
            ValueError: If the folder holds such results, and they are not to be replaced.
        """
        if not (folder / REPORT).exists():
            return
        try:
            _refuse_others(folder, now, self.advice)
        except ValueError:
            if not overwrite:
                raise
            self._replaced = folder

    def begin(self, folder: Path) -> None:
        """Write nothing until this run is through, if the folder has results of an earlier one.

        A run within a run ends with the outer one.
        """
        self.saved = self.saved and self._begun > 0
        self._begun += 1
        if self._held is None and (folder / REPORT).exists():
            self._held = {}

    def end(self) -> bool:
        """Write what was held back, unless this run is within another; return whether it is not."""
        self._begun = max(0, self._begun - 1)
        if self._begun:
            return False
        held, self._held = self._held or {}, None
        for write in held.values():
            write()
        folder, self._replaced = self._replaced, None
        if folder is not None and folder / REPORT in held:  # which one process holds
            remove_zero_shot(folder, self.evaluations, keep=[file.stem for file in held])
            if not self.searched:
                remove_search(folder)
            if not self.saved and (model := folder / "model").exists():
                log.warning("%s is left as it is: the model of the run before, and not that of the report", model)
        return True

    def drop(self) -> None:
        """Leave the results of the earlier run as they are: this one failed."""
        self._begun, self._held, self._replaced = 0, None, None

    def write(self, file: Path, write: Callable[[], None], trainer: Trainer) -> None:
        """Write a file on the first process, now or in the end; in the end only the last version is written."""
        if not trainer.is_global_zero or not keeps_files(trainer):
            return
        if self._held is None:
            write()
        else:
            self._held[file] = write

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors for a checkpoint."""
        report = self.report.to_dict() if self.report else None
        return {
            "report": report,
            "evaluations": self.evaluations,
            "samples": self.samples,
            "training": self.training,
            "trained": self.trained,
            "came_with_zeros": self.came_with_zeros,
            "zeros": self._zeros,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, also in an older version; evaluations of the same weights stay."""
        evaluations, samples, training = state["evaluations"], state.get("samples", {}), state.get("training", [])
        known = bool(training) and (self.trained, self.training) == (state["trained"], training)
        self.evaluations = evaluations | (self.evaluations if known else {})
        self.samples = samples | (self.samples if known else {})
        self.training, self.trained = training, state["trained"]
        self.came_with_zeros = state.get("came_with_zeros", "as loaded" in self.evaluations)
        self._zeros = state.get("zeros", {})
        self.report = PruningReport.from_dict(state["report"]) if state["report"] else None
        if self.report is not None:
            self.report.evaluations, self.report.samples = self.evaluations, self.samples
            self.report.training = self.training


def keeps_files(trainer: Trainer) -> bool:
    """Whether the results of a run are kept; those of a ``fast_dev_run`` are not, but of models that live on disk."""
    return not cast(Any, trainer).fast_dev_run or bool(getattr(trainer.lightning_module, "stream", False))


def _refuse_others(folder: Path, now: dict[str, dict[str, Any]], advice: str) -> None:
    try:
        there = read_json(folder / REPORT)
        before = {"method": there["method"], "pattern": there["pattern"], "sparsity": there["target_sparsity"]}
        before["method"] = before["method"].removeprefix(FOUND)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / REPORT} is no report of a pruning ({error!r}): choose another folder") from error
    unsaid = {"true_sequential": None}
    there["settings"] = unsaid | (there.get("settings") or before)  # a report of an older version says less
    now["settings"] = unsaid | now["settings"]
    now = json.loads(json.dumps(now, default=str))  # as it will be read back
    other = [
        difference
        for part, values in now.items()
        for name, difference in differences(there.get(part) or {}, values).items()
        if name in values and name in (there.get(part) or {})
    ]
    if other:
        raise ValueError(f"{folder} holds the results of another run: {'; '.join(other)}. {advice}")
