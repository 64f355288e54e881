"""Keeping other libraries from saying what does not matter here."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
