"""Post-training pruning of language models, inside PyTorch Lightning.

Public names are imported when they are first used: ``import wanda_lightning`` costs nothing.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wanda_lightning.moved import MovedModules

_MODULES = {
    "sparsity": (
        "SemiStructured",
        "Unstructured",
    ),
    "statistics": (
        "InputHessian",
        "InputNorm",
    ),
    "methods": (
        "ADMM",
        "RIA",
        "Ablate",
        "Magnitude",
        "PruningMethod",
        "ScoreMethod",
        "SparseGPT",
        "Wanda",
    ),
    "allocation.atp": ("ATP",),
    "allocation.least_loss": ("LeastLoss",),
    "allocation.owl": ("OWL",),
    "allocation.schedule": ("Gradual",),
    "engine.journal": ("Journal",),
    "engine.processes": ("Processes",),
    "engine.pruner": ("prune_model",),
    "engine.reconstruction": ("Reconstruction",),
    "report.pruning_report": ("PruningReport",),
    "training.distillation": ("Distillation",),
    "training.lora": (
        "LoraSettings",
        "merge_masked",
    ),
    "checkpoints.loading": (
        "load_model",
        "load_streamed",
        "load_tokenizer",
    ),
    "checkpoints.saving": ("save_pretrained",),
    "export.compression": (
        "compress",
        "decompress",
        "load_compressed",
    ),
    "export.semi_structured": ("to_semi_structured",),
    "inspection.inspect_model": ("inspect_model",),
    "data": ("TextDataModule",),
    "evaluation": ("evaluate_zero_shot",),
    "callbacks": (
        "ADMMPruning",
        "AblatePruning",
        "MagnitudePruning",
        "PruningCallback",
        "RIAPruning",
        "SparseFinetuning",
        "SparseGPTPruning",
        "WandaPruning",
        "ZeroShotEvaluation",
    ),
    "callbacks.transformers_trainer": ("KeepZeros",),
    "runs.causal_lm": ("CausalLM",),
    "runs.comparison": ("Comparison",),
    "runs.generation_speed": ("measure_speed",),
    "runs.search_result": ("SearchResult",),
    "runs.trainer": ("PruningTrainer",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_HOME]

if TYPE_CHECKING:
    from wanda_lightning.allocation.atp import ATP
    from wanda_lightning.allocation.least_loss import LeastLoss
    from wanda_lightning.allocation.owl import OWL
    from wanda_lightning.allocation.schedule import Gradual
    from wanda_lightning.callbacks import (
        AblatePruning,
        ADMMPruning,
        MagnitudePruning,
        PruningCallback,
        RIAPruning,
        SparseFinetuning,
        SparseGPTPruning,
        WandaPruning,
        ZeroShotEvaluation,
    )
    from wanda_lightning.callbacks.transformers_trainer import KeepZeros
    from wanda_lightning.checkpoints.loading import load_model, load_streamed, load_tokenizer
    from wanda_lightning.checkpoints.saving import save_pretrained
    from wanda_lightning.data import TextDataModule
    from wanda_lightning.engine.journal import Journal
    from wanda_lightning.engine.processes import Processes
    from wanda_lightning.engine.pruner import prune_model
    from wanda_lightning.engine.reconstruction import Reconstruction
    from wanda_lightning.evaluation import evaluate_zero_shot
    from wanda_lightning.export.compression import compress, decompress, load_compressed
    from wanda_lightning.export.semi_structured import to_semi_structured
    from wanda_lightning.inspection.inspect_model import inspect_model
    from wanda_lightning.methods import ADMM, RIA, Ablate, Magnitude, PruningMethod, ScoreMethod, SparseGPT, Wanda
    from wanda_lightning.report.pruning_report import PruningReport
    from wanda_lightning.runs.causal_lm import CausalLM
    from wanda_lightning.runs.comparison import Comparison
    from wanda_lightning.runs.generation_speed import measure_speed
    from wanda_lightning.runs.search_result import SearchResult
    from wanda_lightning.runs.trainer import PruningTrainer
    from wanda_lightning.sparsity import SemiStructured, Unstructured
    from wanda_lightning.statistics import InputHessian, InputNorm
    from wanda_lightning.training.distillation import Distillation
    from wanda_lightning.training.lora import LoraSettings, merge_masked


sys.meta_path.insert(0, MovedModules())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


def _version() -> str:
    """Return the version that was installed, which comes from the tags of the repository."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("wanda-lightning")
    except PackageNotFoundError:  # used from a folder
        return "unknown"
