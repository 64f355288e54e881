"""Solvers of the layer-wise problem: change the kept weights so that the outputs move as little as they can."""

from wanda_lightning.solvers.admm import prune_with_admm
from wanda_lightning.solvers.conjugate_gradients import fit_kept_weights
from wanda_lightning.solvers.factor import Factor, factorize
from wanda_lightning.solvers.obs import prune_with_mask, prune_with_scores

__all__ = ["Factor", "factorize", "fit_kept_weights", "prune_with_admm", "prune_with_mask", "prune_with_scores"]
