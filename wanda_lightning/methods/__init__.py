"""Pruning methods: one paper, one file."""

from wanda_lightning.methods.ablate import Ablate
from wanda_lightning.methods.admm import ADMM
from wanda_lightning.methods.base import PruningMethod, ScoreMethod
from wanda_lightning.methods.magnitude import Magnitude
from wanda_lightning.methods.ria import RIA
from wanda_lightning.methods.sparsegpt import SparseGPT
from wanda_lightning.methods.wanda import Wanda

__all__ = ["ADMM", "RIA", "Ablate", "Magnitude", "PruningMethod", "ScoreMethod", "SparseGPT", "Wanda"]
