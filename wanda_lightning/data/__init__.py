"""Text for calibration, training and evaluation, as windows of tokens."""

from wanda_lightning.data.datamodule import TextDataModule

__all__ = ["TextDataModule"]
