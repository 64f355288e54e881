"""Lightning callbacks: thin shells over the engine."""

from wanda_lightning.callbacks.depth import DepthPruning
from wanda_lightning.callbacks.methods import (
    AblatePruning,
    ADMMPruning,
    MagnitudePruning,
    RIAPruning,
    SparseGPTPruning,
    WandaPruning,
)
from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.callbacks.sparse_finetuning import SparseFinetuning
from wanda_lightning.callbacks.width import WidthPruning
from wanda_lightning.callbacks.zero_shot import ZeroShotEvaluation

__all__ = [
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
]
