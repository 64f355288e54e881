"""Keeping other libraries from saying what does not matter here."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from wanda_lightning.checkpoints.folders import model_folder

SMALL = 2 * 1024**3  # bytes of weights that are loaded before a bar could be read


@contextmanager
def quiet(logger: str, least: int = logging.ERROR) -> Iterator[None]:
    """Drop what a logger says below a level, such as hints on a command line that is not in use."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(least)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from showing a bar for a model that nobody asked it to load."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def quiet_if_small(pretrained: str | Path) -> AbstractContextManager[None]:
    """Keep transformers from showing bars where a model is small and here already; downloads and large ones have them.

    Args:
        pretrained: See :func:`wanda_lightning.load_model`.

    Returns:
        What keeps them away for a while.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    pretrained = model_folder(pretrained)
    folder = Path(pretrained).expanduser()
    files = [folder] if folder.is_file() else [*folder.glob("*.safetensors")]
    if not folder.exists():
        try:
            cached = try_to_load_from_cache(pretrained, "model.safetensors")
        except HFValidationError:  # no name of a model; loading it says so
            cached = None
        files = [Path(cached)] if isinstance(cached, str) else []
    small = files and sum(file.stat().st_size for file in files) < SMALL
    return without_progress_bars() if small else nullcontext()
