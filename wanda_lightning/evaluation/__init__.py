"""Evaluation: perplexity, and zero-shot tasks."""

from wanda_lightning.evaluation.perplexity import Perplexity

__all__ = ["Perplexity"]
