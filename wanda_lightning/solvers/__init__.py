"""Solvers of the layer-wise problem: change the kept weights so that the outputs move as little as they can."""

from wanda_lightning.solvers.factor import Factor, factorize
from wanda_lightning.solvers.obs import prune_with_mask, prune_with_scores

__all__ = ["Factor", "factorize", "prune_with_mask", "prune_with_scores"]
