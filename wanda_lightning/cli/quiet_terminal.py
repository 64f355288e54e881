"""What Lightning says on every start and nobody asked for is left out."""

import logging

UNASKED = ("💡", "GPU available: False", "TPU available: False", "Seed set to", "`Trainer.fit` stopped: ")
LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")


def leave_out_what_nobody_asked() -> None:
    """Drop advertisements, and lines about devices that are not there; what is used is still said."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(is_of_use)


def is_of_use(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's tells the user something."""
    return record.levelno > logging.INFO or not record.getMessage().startswith(UNASKED)
