"""What an earlier run has written beside its report, to be deleted once its report is replaced by that of another."""

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from wanda_lightning.report.pruning_report import REPORT_FILES

STAGES = re.compile(r"(dense|as loaded|pruned|fine-tuned|merged|smaller|step-\d+|validate|test)\.json")
"""The files in ``zero_shot/``; others there are the user's own."""
SEARCH_FILES = ("search.json", "search.md", "search.png")
TRIAL = re.compile(r"[\d.e-]+")
"""The folders in ``trials/`` are named by their sparsities."""


def remove_zero_shot(folder: Path, evaluations: Mapping[str, Collection[str]], keep: Collection[str] = ()) -> None:
    """Delete the zero-shot results of a run, but for stages whose evaluations have some, and others that are named."""
    asked = {stage for stage, metrics in evaluations.items() if any("zero_shot/" in name for name in metrics)}
    for file in [*(folder / "zero_shot").glob("*.json")]:
        if STAGES.fullmatch(file.name) and file.stem not in {*asked, *keep}:
            file.unlink()
    _remove_if_empty(folder / "zero_shot")


def remove_trials(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete the trials of a search, but for those of some names."""
    for trial in [*(folder / "trials").glob("*")]:
        if TRIAL.fullmatch(trial.name) and trial.name not in keep:
            for name in REPORT_FILES:
                (trial / name).unlink(missing_ok=True)
            remove_zero_shot(trial, {})
            _remove_if_empty(trial)
    _remove_if_empty(folder / "trials")


def remove_search(folder: Path) -> None:
    """Delete what a search has left."""
    for name in SEARCH_FILES:
        (folder / name).unlink(missing_ok=True)
    remove_trials(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
