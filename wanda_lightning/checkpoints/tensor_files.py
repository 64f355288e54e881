"""Safetensors files of a model, read and written tensor by tensor: the model need not fit into memory."""

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"
PLAIN = ".safetensors"
COMPRESSED = ".compressed.safetensors"  # from_pretrained must not take these files for ordinary weights


class Entry(NamedTuple):
    """A tensor as a file's header describes it; ``dtype`` as safetensors writes it, such as ``BF16``."""

    name: str
    dtype: str
    shape: Sequence[int]
    nbytes: int


def weight_files(folder: Path, suffix: str = PLAIN) -> list[Path]:
    """List the safetensors files of a model that ``save_pretrained`` wrote.

    Args:
        folder: The model's folder.
        suffix: The end of the files' names, if it is not the one that transformers gives them.

    Returns:
        The files, all of them there; none if the folder has no safetensors weights.

    Raises:
        ValueError: If the folder does not exist, or lacks files that its index names.
    """
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    single, is_compressed = folder / f"model{suffix}", any(folder.glob(f"*{COMPRESSED}"))
    if single.is_file():  # transformers looks for it first, too: the index may be left over from an earlier save
        return [single]
    if not (folder / INDEX).is_file() or is_compressed != (suffix == COMPRESSED):
        return []
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} is no index of weights: {error!r}") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{folder / INDEX} names files outside its folder: {outside}")
    names = [name.removesuffix(PLAIN) + suffix for name in names]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that its index names: {missing}"
        )
    return [folder / name for name in names]


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; tensors are read when they are asked for.

    Args:
        file: The file.

    Yields:
        The open file, as ``safetensors.safe_open`` gives it.

    Raises:
        ValueError: If the file is cut off, or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off, or no safetensors file ({error}): copy or download it again") from error


def header_of(entries: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    """Write what a safetensors file begins with: the header's length in 8 bytes, and the header as JSON.

    Args:
        entries: What the header says of each tensor.
        metadata: The header's other entries.

    Returns:
        The header. The tensors follow, one behind the other.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensors(
    file: Path, entries: Sequence[Entry], arrays: Iterable[NDArray[Any]], metadata: dict[str, str]
) -> None:
    """Write a safetensors file from arrays that are made one at a time; safetensors itself wants them all at once.

    Args:
        file: The file.
        entries: What the header says of each tensor.
        arrays: Their contents, in the same order, in any type of the same number of bytes.
        metadata: The header's other entries.
    """
    with file.open("wb") as out:
        out.write(header_of(entries, metadata))
        for entry, array in zip(entries, arrays, strict=True):
            assert array.nbytes == entry.nbytes, entry.name
            out.write(array.data)
