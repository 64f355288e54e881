"""What the command line says of mistakes: what was wrong and what helps, without how it came to be seen."""

import errno
import re
from traceback import walk_tb

from wanda_lightning.cli.parser_messages import shortened

NO_MEMORY = """
what takes less: fewer or shorter calibration sequences (--data.num_samples, --data.sequence_length), smaller batches
(--data.calibration_batch_size 1, --data.batch_size 1), --model.dtype bfloat16; where nothing is trained --model.stream
true, which holds one layer at a time; in training --model.gradient_checkpointing true, or adapters (-c wanda_lora).
`wanda-lightning inspect MODEL` estimates the need"""
DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT}  # full, size limit, read-only, quota

# Modules that read what the user named, mostly by packages of others.
READERS = (
    "wanda_lightning.checkpoints.",
    "wanda_lightning.data.",
    "wanda_lightning.evaluation.tasks",
    "lightning.pytorch.trainer.connectors.accelerator_connector",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)


def explained(error: Exception) -> str | None:
    """Say in a few lines what was wrong and what helps.

    Args:
        error: What ended the command.

    Returns:
        The message; None if nothing that the user gave or has is to blame.
    """
    message = str(error).strip().partition("\n\n")[0]  # further paragraphs are advice that may not fit
    message = message or type(error).__name__
    misconfigured = _is(error, "MisconfigurationException")
    if _out_of_memory(error):
        return f"out of memory: {message.partition(chr(10))[0]}{NO_MEMORY}"
    if _not_writable(error):
        return f"the disk takes no more ({message}): make room there, or name an output folder elsewhere"
    if misconfigured and "gpu backend" in message:
        return "no GPU was found that this torch can use: leave --trainer.accelerator out, or set it to cpu"
    if "trust_remote_code" in message:
        return f"{message.partition('. ')[0]}: look at it, and add --trust_remote_code true if you trust it"
    if isinstance(error, ImportError) and not (error.name or "").startswith("wanda_lightning"):
        return f"a package is missing, or does not fit the others: {message}"
    if misconfigured or isinstance(error, ValueError | OSError):
        return shortened(message)
    if _while_reading(error):
        return f"what was named cannot be read: {message} ({type(error).__name__})"
    return None


def exit_code(error: Exception) -> int:
    """Return 1 for what the machine lacks, 2 for a mistake in what the user gave."""
    return (
        1 if _out_of_memory(error) or _not_writable(error) or isinstance(error, ConnectionError | TimeoutError) else 2
    )


def _is(error: Exception, name: str) -> bool:
    """Whether an error is of a class whose import takes seconds."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _out_of_memory(error: Exception) -> bool:
    kind = isinstance(error, MemoryError) or _is(error, "OutOfMemoryError")
    return kind or "DefaultCPUAllocator: can't allocate" in str(error)


def _not_writable(error: Exception) -> bool:
    """Whether the disk is to blame; safetensors, and whoever adds to a message, says the number in the text only."""
    said = re.findall(r"(?:Errno|os error) (\d+)", str(error))
    return not DISK_ERRORS.isdisjoint({getattr(error, "errno", None), *map(int, said)})


def _while_reading(error: Exception) -> bool:
    """Whether a package of others raised this while it read a model, a data set, a task or a checkpoint for us."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    callers = [module for module in modules if module.startswith(("wanda_lightning.", *READERS))]
    if not callers or callers[-1] == "wanda_lightning.checkpoints.saving":  # which writes
        return False
    return callers[-1].startswith(READERS) and not modules[-1].startswith("wanda_lightning.")
