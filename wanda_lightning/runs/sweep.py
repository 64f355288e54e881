"""Several methods and sparsities on one model: one dense evaluation, a folder for each run, one table and picture."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from wanda_lightning.allocation.allocator import Allocator
from wanda_lightning.arguments import several
from wanda_lightning.callbacks import PruningCallback
from wanda_lightning.callbacks.plumbing.run_identity import describe_settings
from wanda_lightning.callbacks.pruning import pruning_callbacks, run_folder
from wanda_lightning.callbacks.shape_pruning import shape_callbacks
from wanda_lightning.json_files import read_json, write_json
from wanda_lightning.methods import PruningMethod
from wanda_lightning.methods.named import MethodName, as_method
from wanda_lightning.report.pruning_report import REPORT
from wanda_lightning.runs import plotting
from wanda_lightning.runs.comparison import Comparison
from wanda_lightning.runs.trials import (
    DenseWeights,
    check_whole,
    evaluate,
    other_settings,
    prune_and_evaluate,
    settings_of,
)
from wanda_lightning.sparsity import Pattern, parse_pattern

ADVICE = "Choose another folder (--output on the command line), or delete this one"
"""What to do where results are in the way: a sweep has no --overwrite."""


def sweep(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    methods: Sequence[PruningMethod | MethodName],
    sparsities: Sequence[float],
    patterns: Sequence[str],
    allocations: Sequence[Allocator] = (),
) -> Comparison:
    """Prune one model in every way asked for, each time from the dense weights; see :meth:`PruningTrainer.sweep`."""
    folder = run_folder(trainer)
    asked = {"methods": methods, "sparsities": sparsities, "patterns": patterns, "allocations": allocations}
    for name, given in asked.items():
        several(name, given)
    check_whole(trainer, model, datamodule, "a sweep")
    callbacks = _callbacks(trainer, [*map(as_method, methods)], sparsities, patterns, allocations, folder)
    plotting.check(folder / "comparison.png")
    settings = settings_of(trainer, model, datamodule)
    dense = _recorded(folder / "sweep.json", settings)
    for callback in callbacks:
        callback.run.results.check_folder(Path(str(callback.output_dir)), settings=describe_settings(callback))
    if dense is None:
        dense = evaluate(trainer, model, datamodule)
        if not dense:
            raise ValueError("a sweep has nothing to compare: validation logs no metric, or is limited to no batches")
        write_json(folder / "sweep.json", {"settings": settings, "dense": dense})
    weights = DenseWeights()
    for number, callback in enumerate(callbacks, start=1):
        name = f"run {number} of {len(callbacks)}, {Path(str(callback.output_dir)).name}"
        if _is_done(callback):
            rank_zero_info(f"{name}: done before")
            continue
        rank_zero_info(name)
        callback.evaluations["dense"] = dense
        prune_and_evaluate(trainer, model, datamodule, weights, callback)
    runs = [Path(str(callback.output_dir)) for callback in callbacks]
    comparison = Comparison([*dict.fromkeys([*runs, *_done_before(folder, dense)])])
    if trainer.is_global_zero:
        comparison.save(folder)
        plotting.plot(comparison, folder / "comparison.png")
    return comparison


def _callbacks(
    trainer: Trainer,
    methods: Sequence[PruningMethod],
    sparsities: Sequence[float],
    patterns: Sequence[str],
    allocations: Sequence[Allocator],
    folder: Path,
) -> list[PruningCallback]:
    """Make a pruning callback for every run; all settings are checked here, before the first."""
    if pruning_callbacks(trainer) or shape_callbacks(trainer):
        raise ValueError("a sweep brings its own pruning callbacks: name methods, and leave callbacks like it out")
    splits = [None, *allocations]
    unstructured = [parse_pattern("unstructured", sparsity) for sparsity in sparsities]
    asked: list[tuple[Pattern, Allocator | None]] = [(pattern, split) for pattern in unstructured for split in splits]
    asked += [(parse_pattern(pattern), None) for pattern in patterns]
    runs = {
        _name(method, methods, pattern) + (f"-{_short(split, allocations)}" if split else ""): (method, pattern, split)
        for method in methods
        for pattern, split in asked
    }
    if not runs or len(runs) < len(methods) * len(asked):
        raise ValueError(
            "a sweep needs methods, and sparsities or N:M patterns, each of them once; "
            f"got methods {[*map(str, methods)]}, sparsities {[*sparsities]}, patterns {[*patterns]}"
            + (f", allocations {[*map(str, allocations)]}" if allocations else "")
        )
    callbacks = []
    for name, (method, pattern, split) in runs.items():
        kind: dict[str, Any] = {"allocation": split}
        kind |= {"sparsity": pattern.sparsity} if str(pattern) == "unstructured" else {"pattern": str(pattern)}
        callbacks.append(PruningCallback(method, output_dir=str(folder / name), resume=False, prompts=[], **kind))
        callbacks[-1].run.results.advice = ADVICE
    return callbacks


def _name(method: PruningMethod, methods: Sequence[PruningMethod], pattern: Pattern) -> str:
    """Name a run's folder, such as ``wanda-0.5``; with the method's settings where there are two of its kind."""
    name = _short(method, methods)
    return f"{name}-{pattern.sparsity:g}" if str(pattern) == "unstructured" else f"{name}-{pattern}".replace(":", "of")


def _short(one: object, among: Sequence[object]) -> str:
    alike = sum(type(other) is type(one) for other in among) > 1
    return re.sub(r"[^a-z0-9.]+", "-", (str(one) if alike else type(one).__name__).lower()).strip("-")


def _recorded(file: Path, settings: dict[str, Any]) -> dict[str, float] | None:
    """Read the dense evaluation of an earlier start of this sweep; refuse the folder of another sweep."""
    if not file.exists():
        return None
    found = read_json(file)
    if other := other_settings(found["settings"], settings):
        raise ValueError(f"{file.parent} holds another sweep: {'; '.join(other)}. {ADVICE}")
    return found["dense"]


def _done_before(folder: Path, dense: dict[str, float]) -> list[Path]:
    """Find the runs of earlier sweeps in this folder: what is compared with the same dense evaluation."""
    reports = {file.parent: read_json(file) for file in sorted(folder.glob(f"*/{REPORT}"))}
    evaluations = {run: report["evaluations"] for run, report in reports.items()}
    return [run for run, stages in evaluations.items() if "pruned" in stages and stages.get("dense") == dense]


def _is_done(callback: PruningCallback) -> bool:
    """Whether a run has been evaluated, which comes last; that its settings are these was seen before."""
    file = Path(str(callback.output_dir)) / REPORT
    return file.exists() and "pruned" in read_json(file)["evaluations"]
