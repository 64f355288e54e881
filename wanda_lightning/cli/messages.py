"""What the command line says of mistakes: what was wrong and what helps, without how it came to be seen."""

import errno
import re
from argparse import RawDescriptionHelpFormatter
from traceback import walk_tb

from jsonargparse import DefaultHelpFormatter

from wanda_lightning.cli.first_look import NO_MODEL

# jsonargparse tells every type it tried in turn; only the lines that name the user's mistake are of use.
NOISE = re.compile(
    r"\s*((- )?Does not validate against|Subtypes: |Errors:|- Expected a <class 'NoneType'>|- Not a valid subclass of|"
    r"Subclass types expect|- a (class path|dict)|Given value type|Given value: (\S*[\[({]|.{60}))"
)
UNKNOWN_OPTION = re.compile(
    r"Parser key \"(\S+)\":.*?class_path '\S*?(\w+)':\s+Option '\w+' is not accepted", re.DOTALL
)
OTHER_TYPE = re.compile(r"\s*- Problem with given class_path 'lightning\.")

NO_MEMORY = """
what takes less: fewer or shorter calibration sequences (--data.num_samples, --data.sequence_length), smaller batches
(--data.calibration_batch_size 1, --data.batch_size 1), --model.dtype bfloat16; where nothing is trained --model.stream
true, which holds one layer at a time; in training --model.gradient_checkpointing true, or adapters (-c wanda_lora).
`wanda-lightning inspect MODEL` estimates the need"""
READERS = (
    "wanda_lightning.checkpoints.",
    "wanda_lightning.data.",
    "wanda_lightning.evaluation.tasks",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)
NO_SPACE = "free some, or write elsewhere: --trainer.default_root_dir FOLDER"


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of descriptions as they are."""


def explained(error: Exception) -> str | None:
    """Say in a few lines what was wrong and what helps.

    Args:
        error: What ended the command.

    Returns:
        The message; None if nothing that the user gave or has is to blame.
    """
    message = str(error).strip().partition("\n\n")[0]  # further paragraphs are advice that may not fit
    misconfigured = _is(error, "MisconfigurationException")
    if _out_of_memory(error):
        return f"out of memory: {message.partition(chr(10))[0]}{NO_MEMORY}"
    if _disk_full(error):
        return f"no space is left on the disk ({message}); {NO_SPACE}"
    if misconfigured and "gpu backend" in message:
        return "no GPU was found that this torch can use: leave --trainer.accelerator out, or set it to cpu"
    if isinstance(error, ImportError) and not (error.name or "").startswith("wanda_lightning"):
        return f"a package is missing, or does not fit the others: {message}"
    if misconfigured or isinstance(error, ValueError | OSError):
        return shortened(message)
    if _while_reading(error):
        return f"what was named cannot be read: {message} ({type(error).__name__})"
    return None


def exit_code(error: Exception) -> int:
    """Return 1 for what the machine lacks, 2 for a mistake in what the user gave."""
    return 1 if _out_of_memory(error) or _disk_full(error) or isinstance(error, ConnectionError | TimeoutError) else 2


def _is(error: Exception, name: str) -> bool:
    """Whether an error is of a class whose import takes seconds."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _out_of_memory(error: Exception) -> bool:
    kind = isinstance(error, MemoryError) or _is(error, "OutOfMemoryError")
    return kind or "DefaultCPUAllocator: can't allocate" in str(error)


def _disk_full(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _while_reading(error: Exception) -> bool:
    """Whether a package of others raised this while it read a model, a data set, a task or a checkpoint for us."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    callers = [module for module in modules if module.startswith(("wanda_lightning.", *READERS))]
    ours = modules[-1].startswith("wanda_lightning.")
    return not ours and callers[-1].startswith(READERS) if callers else False


def shortened(message: str) -> str:
    """Cut a message of the argument parser down to the mistake; other messages stay as they are.

    Args:
        message: The message, over several lines.

    Returns:
        The lines that name the option, the value and what is accepted.
    """
    if 'Parser key "model"' in message and "arguments are required: pretrained" in message:
        return NO_MODEL
    if "Does not validate against" in message:
        message = _without_noise(message)
    if unknown := UNKNOWN_OPTION.search(message):
        message += f"\n  what is accepted: --{unknown[1]}.help {unknown[2]}"
    return message


def _without_noise(message: str) -> str:
    lines = [line for line in _without_other_types(message.splitlines()) if not NOISE.match(line)]
    lines = [re.sub(r"<class '(\w+)'>", r"\1", re.sub(r"^(\s*)- ", r"\1", line)) for line in lines]
    if number := re.search(r'"pattern":\s+Expected a .*str.* Got value: (\d+)', message):
        from wanda_lightning.sparsity import parse_pattern  # and with it torch

        try:
            parse_pattern(number[1])
        except ValueError as error:
            lines = [*lines[:-1], f"  {error}"]
    return "\n".join(dict.fromkeys(lines)).strip()


def _without_other_types(lines: list[str]) -> list[str]:
    """Leave out what is wrong with the value as another type than the one that the user named."""
    kept: list[str] = []
    other = None  # how far the block to leave out is indented
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if other is not None and depth <= other:
            other = None
        if other is None and OTHER_TYPE.match(line):
            other = depth
        if other is None:
            kept.append(line)
    return kept
