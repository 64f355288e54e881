"""Post-training pruning of language models, inside PyTorch Lightning.

Public names are imported when they are first used: ``import wanda_lightning`` costs nothing.
"""

import atexit
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_MODULES = {
    "sparsity": ("SemiStructured", "Unstructured"),
    "statistics": ("InputHessian", "InputNorm"),
    "methods": ("Ablate", "Magnitude", "SparseGPT", "Wanda"),
    "pruner": ("prune_model",),
    "report": ("PruningReport",),
    "saving": ("save_pretrained",),
    "semi_structured": ("to_semi_structured",),
    "callbacks": (
        "AblatePruning",
        "MagnitudePruning",
        "SparseFinetuning",
        "SparseGPTPruning",
        "WandaPruning",
        "ZeroShotEvaluation",
    ),
    "evaluation": ("evaluate_zero_shot",),
    "module": ("CausalLM",),
    "data": ("TextDataModule",),
    "trainer": ("PruningTrainer",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_HOME]

if TYPE_CHECKING:
    from wanda_lightning.callbacks import (
        AblatePruning,
        MagnitudePruning,
        SparseFinetuning,
        SparseGPTPruning,
        WandaPruning,
        ZeroShotEvaluation,
    )
    from wanda_lightning.data import TextDataModule
    from wanda_lightning.evaluation import evaluate_zero_shot
    from wanda_lightning.methods import Ablate, Magnitude, SparseGPT, Wanda
    from wanda_lightning.module import CausalLM
    from wanda_lightning.pruner import prune_model
    from wanda_lightning.report import PruningReport
    from wanda_lightning.saving import save_pretrained
    from wanda_lightning.semi_structured import to_semi_structured
    from wanda_lightning.sparsity import SemiStructured, Unstructured
    from wanda_lightning.statistics import InputHessian, InputNorm
    from wanda_lightning.trainer import PruningTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


@atexit.register
def _leave_processes() -> None:
    """Leave gloo's process group; Lightning leaves NCCL's only, and rank 0 may then abort at its end (issue 20620)."""
    distributed: Any = sys.modules.get("torch.distributed")
    together = distributed and distributed.is_available() and distributed.is_initialized()
    if together and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
