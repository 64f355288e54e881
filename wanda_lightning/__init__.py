"""Post-training pruning of language models, inside PyTorch Lightning."""

__version__ = "0.1.0.dev0"
