"""What Lightning says on every start and nobody asked for is left out, as are retries of the hub but the first."""

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


class FirstRetry:
    """Tells once that the hub is tried again: two lines would come of every retry, and none in half a minute."""

    def __init__(self) -> None:
        self._told = False

    def __call__(self, record: logging.LogRecord) -> bool:
        """Whether a line of the hub's is shown."""
        if record.levelno >= logging.ERROR:
            return True
        if self._told or not record.getMessage().startswith("Retrying"):
            return False
        record.msg, record.args, self._told = "the hub does not answer; it is tried for half a minute", (), True
        return True
