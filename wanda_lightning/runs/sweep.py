"""Several methods and sparsities on one model: one dense evaluation, a folder for each run, one table and picture."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from wanda_lightning.atomic_files import write_text
from wanda_lightning.callbacks import PruningCallback, ZeroShotEvaluation
from wanda_lightning.callbacks.pruning import pruning_callbacks, run_folder
from wanda_lightning.engine.fingerprint import differences
from wanda_lightning.methods import PruningMethod
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.language_model import find_language_model
from wanda_lightning.runs import plotting
from wanda_lightning.runs.comparison import Comparison
from wanda_lightning.runs.one_shot import prune
from wanda_lightning.sparsity import Pattern, parse_pattern


def sweep(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    methods: Sequence[PruningMethod],
    sparsities: Sequence[float],
    patterns: Sequence[str],
) -> Comparison:
    """Prune one model in every way asked for, each time from the dense weights; see :meth:`PruningTrainer.sweep`."""
    folder = run_folder(trainer)
    if getattr(model, "stream", False):
        raise ValueError("a sweep keeps the dense weights in memory, and stream leaves them on disk: prune one by one")
    callbacks = _callbacks(trainer, methods, sparsities, patterns, folder)
    plotting.check(folder / "comparison.png")
    settings = _settings(trainer, model, datamodule)
    dense = _recorded(folder / "sweep.json", settings)
    if dense is None:
        trainer.validate(model, datamodule=datamodule, verbose=False)
        dense = {name: float(value) for name, value in trainer.callback_metrics.items()}
        write_text(folder / "sweep.json", json.dumps({"settings": settings, "dense": dense}, indent=2) + "\n")
    weights = _DenseWeights()
    for number, callback in enumerate(callbacks, start=1):
        name = f"run {number} of {len(callbacks)}, {Path(str(callback.output_dir)).name}"
        if _is_done(callback):
            rank_zero_info(f"{name}: done before")
            continue
        rank_zero_info(name)
        callback.evaluations["dense"] = dense
        with _with_callbacks(trainer, weights, callback):
            prune(trainer, model, datamodule=datamodule, evaluate=False, save=False)
            trainer.validate(model, datamodule=datamodule, verbose=False)
    comparison = Comparison([callback.output_dir for callback in callbacks if callback.output_dir])
    if trainer.is_global_zero:
        comparison.save(folder)
        plotting.plot(comparison, folder / "comparison.png")
    return comparison


class _DenseWeights(Callback):
    """Keeps a copy of the weights as they are before the first pruning, and brings them back before the others."""

    def __init__(self) -> None:
        self._dense: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy or bring back; this callback stands before the one that prunes."""
        layers = decoder_layers(find_language_model(pl_module), targets=["*"])
        weights = {name: weight for layer in layers for name, weight in layer.weights.items()}
        for name, weight in weights.items():
            if name in self._dense:
                weight.copy_(self._dense[name])
            else:
                self._dense[name] = weight.detach().clone()


def _callbacks(
    trainer: Trainer,
    methods: Sequence[PruningMethod],
    sparsities: Sequence[float],
    patterns: Sequence[str],
    folder: Path,
) -> list[PruningCallback]:
    """Make a pruning callback for every run; all settings are checked here, before the first."""
    if pruning_callbacks(trainer):
        raise ValueError("a sweep brings its own pruning callbacks: name methods, and leave callbacks like it out")
    asked: list[Pattern] = [parse_pattern("unstructured", sparsity) for sparsity in sparsities]
    asked += [parse_pattern(pattern) for pattern in patterns]
    runs = {_name(method, methods, pattern): (method, pattern) for method in methods for pattern in asked}
    if not runs or len(runs) < len(methods) * len(asked):
        raise ValueError(
            "a sweep needs methods, and sparsities or N:M patterns, each of them once; "
            f"got methods {[*map(str, methods)]}, sparsities {[*sparsities]}, patterns {[*patterns]}"
        )
    callbacks = []
    for name, (method, pattern) in runs.items():
        kind = {"sparsity": pattern.sparsity} if str(pattern) == "unstructured" else {"pattern": str(pattern)}
        callbacks.append(PruningCallback(method, output_dir=str(folder / name), resume=False, prompts=[], **kind))
    return callbacks


def _name(method: PruningMethod, methods: Sequence[PruningMethod], pattern: Pattern) -> str:
    """Name a run's folder, such as ``wanda-0.5``; with the method's settings where there are two of its kind."""
    alike = sum(type(other) is type(method) for other in methods) > 1
    name = re.sub(r"[^a-z0-9.]+", "-", (str(method) if alike else type(method).__name__).lower()).strip("-")
    return f"{name}-{pattern.sparsity:g}" if str(pattern) == "unstructured" else f"{name}-{pattern}".replace(":", "of")


def _recorded(file: Path, settings: dict[str, Any]) -> dict[str, float] | None:
    """Read the dense evaluation of an earlier start of this sweep; refuse the folder of another sweep."""
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    before = found["settings"]
    other = [
        f"{part}.{difference}"
        for part in {**before, **settings}
        for difference in differences(before.get(part, {}), settings.get(part, {})).values()
    ]
    if other:
        raise ValueError(f"{file.parent} holds another sweep, choose another folder; {'; '.join(other)}")
    return found["dense"]


def _is_done(callback: PruningCallback) -> bool:
    file = Path(callback.output_dir or "") / "pruning.json"
    if not file.exists():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    same = (found["method"], found["pattern"]) == (str(callback.method), str(callback.pattern))
    return same and "pruned" in found["evaluations"]  # which comes last


def _settings(trainer: Any, model: Any, datamodule: Any) -> dict[str, dict[str, Any]]:
    """Collect what the figures of a sweep depend on, besides methods and sparsities, as JSON types."""
    settings = {
        "model": {**_hyperparameters(model), **getattr(model, "model_kwargs", {})},
        "data": _hyperparameters(datamodule),
        "trainer": {"precision": trainer.precision},
    }
    for callback in trainer.callbacks:
        if isinstance(callback, ZeroShotEvaluation):
            asked = {"tasks": callback.tasks, "include_path": callback.include_path}
            settings["zero_shot"] = {**asked, **callback.settings}
    return json.loads(json.dumps(settings, default=str))


def _hyperparameters(part: Any) -> dict[str, Any]:
    return {"class": type(part).__name__, **getattr(part, "hparams", {})}


@contextmanager
def _with_callbacks(trainer: Any, *callbacks: Callback) -> Iterator[None]:
    before = list(trainer.callbacks)
    trainer.callbacks.extend(callbacks)
    try:
        yield
    finally:
        trainer.callbacks[:] = before
