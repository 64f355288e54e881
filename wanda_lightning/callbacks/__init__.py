"""Lightning callbacks: thin shells over the engine."""

from wanda_lightning.callbacks.pruning import MagnitudePruning, PruningCallback, WandaPruning
from wanda_lightning.callbacks.sparse_finetuning import SparseFinetuning

__all__ = ["MagnitudePruning", "PruningCallback", "SparseFinetuning", "WandaPruning"]
