"""Files and folders that are whole or not there: written beside their place, to the disk, then renamed."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from filelock import FileLock, Timeout

LOCK = "lock"
"""Held within a temporary folder while it is written."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Args:
        path: Where the file goes; folders are made, an older file is replaced.

    Yields:
        A temporary file to write to. At the end it takes its place; after an error it is deleted.
    """
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}-{token_hex(4)}{path.suffix}")
    unfinished.touch(exist_ok=False)
    mode = unfinished.stat().st_mode  # as the umask has it; libraries may make a file of their own, for nobody else
    try:
        yield unfinished
        unfinished.chmod(mode)
        _to_disk(unfinished)
        os.replace(unfinished, path)
        _to_disk(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Write a folder whole or not at all.

    Args:
        path: Where the folder goes; folders are made, an older one is replaced. There has to be room for both.

    Yields:
        A temporary folder to write to. At the end it takes its place; after an error it is deleted.
    """
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(path)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    unfinished, old = beside / "new", beside / "old"
    try:
        with FileLock(beside / LOCK):
            unfinished.mkdir()
            mode = unfinished.stat().st_mode  # as the umask and the folder around it have it
            yield unfinished
            for part in (*unfinished.rglob("*"), unfinished):  # safetensors makes files that nobody else may read
                part.chmod(mode if part.is_dir() else mode & 0o666)
                _to_disk(part)
            if path.exists():
                path.rename(old)
            unfinished.rename(path)
            _to_disk(path.parent)
    finally:
        _take_back(path, beside)


def _clear_up(path: Path) -> None:
    """Delete what writes of a folder have left that were killed; those that go on hold a lock."""
    for beside in path.parent.glob(f".{glob.escape(path.name)}-????????"):
        if (beside / LOCK).exists():
            with suppress(Timeout), FileLock(beside / LOCK, timeout=0):
                _take_back(path, beside)


def _take_back(path: Path, beside: Path) -> None:
    """Delete a temporary folder, and put back what had been there before, if the last step did not come."""
    if (beside / "old").exists() and not path.exists():
        (beside / "old").rename(path)
    shutil.rmtree(beside, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; Windows flushes no folders."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes only what may be written
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
