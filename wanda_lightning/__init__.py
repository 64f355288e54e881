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
    "engine.depth": ("prune_depth",),
    "engine.journal": ("Journal",),
    "engine.processes": ("Processes",),
    "engine.pruner": ("prune_model",),
    "engine.reconstruction": ("Reconstruction",),
    "engine.width": ("prune_width",),
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
        "DepthPruning",
        "MagnitudePruning",
        "PruningCallback",
        "RIAPruning",
        "SparseFinetuning",
        "SparseGPTPruning",
        "WandaPruning",
        "WidthPruning",
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

if TYPE_CHECKING:  # of a package with types, strict checkers take only names that are imported as themselves
    from wanda_lightning.allocation.atp import ATP as ATP
    from wanda_lightning.allocation.least_loss import LeastLoss as LeastLoss
    from wanda_lightning.allocation.owl import OWL as OWL
    from wanda_lightning.allocation.schedule import Gradual as Gradual
    from wanda_lightning.callbacks import AblatePruning as AblatePruning
    from wanda_lightning.callbacks import ADMMPruning as ADMMPruning
    from wanda_lightning.callbacks import DepthPruning as DepthPruning
    from wanda_lightning.callbacks import MagnitudePruning as MagnitudePruning
    from wanda_lightning.callbacks import PruningCallback as PruningCallback
    from wanda_lightning.callbacks import RIAPruning as RIAPruning
    from wanda_lightning.callbacks import SparseFinetuning as SparseFinetuning
    from wanda_lightning.callbacks import SparseGPTPruning as SparseGPTPruning
    from wanda_lightning.callbacks import WandaPruning as WandaPruning
    from wanda_lightning.callbacks import WidthPruning as WidthPruning
    from wanda_lightning.callbacks import ZeroShotEvaluation as ZeroShotEvaluation
    from wanda_lightning.callbacks.transformers_trainer import KeepZeros as KeepZeros
    from wanda_lightning.checkpoints.loading import load_model as load_model
    from wanda_lightning.checkpoints.loading import load_streamed as load_streamed
    from wanda_lightning.checkpoints.loading import load_tokenizer as load_tokenizer
    from wanda_lightning.checkpoints.saving import save_pretrained as save_pretrained
    from wanda_lightning.data import TextDataModule as TextDataModule
    from wanda_lightning.engine.depth import prune_depth as prune_depth
    from wanda_lightning.engine.journal import Journal as Journal
    from wanda_lightning.engine.processes import Processes as Processes
    from wanda_lightning.engine.pruner import prune_model as prune_model
    from wanda_lightning.engine.reconstruction import Reconstruction as Reconstruction
    from wanda_lightning.engine.width import prune_width as prune_width
    from wanda_lightning.evaluation import evaluate_zero_shot as evaluate_zero_shot
    from wanda_lightning.export.compression import compress as compress
    from wanda_lightning.export.compression import decompress as decompress
    from wanda_lightning.export.compression import load_compressed as load_compressed
    from wanda_lightning.export.semi_structured import to_semi_structured as to_semi_structured
    from wanda_lightning.inspection.inspect_model import inspect_model as inspect_model
    from wanda_lightning.methods import ADMM as ADMM
    from wanda_lightning.methods import RIA as RIA
    from wanda_lightning.methods import Ablate as Ablate
    from wanda_lightning.methods import Magnitude as Magnitude
    from wanda_lightning.methods import PruningMethod as PruningMethod
    from wanda_lightning.methods import ScoreMethod as ScoreMethod
    from wanda_lightning.methods import SparseGPT as SparseGPT
    from wanda_lightning.methods import Wanda as Wanda
    from wanda_lightning.report.pruning_report import PruningReport as PruningReport
    from wanda_lightning.runs.causal_lm import CausalLM as CausalLM
    from wanda_lightning.runs.comparison import Comparison as Comparison
    from wanda_lightning.runs.generation_speed import measure_speed as measure_speed
    from wanda_lightning.runs.search_result import SearchResult as SearchResult
    from wanda_lightning.runs.trainer import PruningTrainer as PruningTrainer
    from wanda_lightning.sparsity import SemiStructured as SemiStructured
    from wanda_lightning.sparsity import Unstructured as Unstructured
    from wanda_lightning.statistics import InputHessian as InputHessian
    from wanda_lightning.statistics import InputNorm as InputNorm
    from wanda_lightning.training.distillation import Distillation as Distillation
    from wanda_lightning.training.lora import LoraSettings as LoraSettings
    from wanda_lightning.training.lora import merge_masked as merge_masked


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
