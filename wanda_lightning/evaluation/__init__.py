"""Evaluation: perplexity, and zero-shot tasks."""

from wanda_lightning.evaluation.perplexity import Perplexity
from wanda_lightning.evaluation.tasks import load_tasks
from wanda_lightning.evaluation.zero_shot import ZeroShotResult, evaluate_zero_shot

__all__ = ["Perplexity", "ZeroShotResult", "evaluate_zero_shot", "load_tasks"]
