"""Lightning callbacks: thin shells over the engine."""

from wanda_lightning.callbacks.methods import AblatePruning, MagnitudePruning, SparseGPTPruning, WandaPruning
from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.callbacks.sparse_finetuning import SparseFinetuning

__all__ = [
    "AblatePruning",
    "MagnitudePruning",
    "PruningCallback",
    "SparseFinetuning",
    "SparseGPTPruning",
    "WandaPruning",
]
