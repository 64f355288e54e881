"""Safetensors files without zeros: a tensor becomes a mask of one bit a weight, and the values that are not zero.

If some zeros are -0.0, the signs of the zeros are stored too: the round trip is exact to the bit. Files are
worked on tensor by tensor. Which tensors were taken apart, their shapes, and checksums are in the file's metadata.
"""

import hashlib
import json
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanda_lightning.checkpoints.tensor_files import Entry, header_of, opened, write_tensors
from wanda_lightning.sparsity import INTEGERS

SHAPES = "wanda_lightning.compressed"
"""Key of a file's metadata: the shapes of the tensors that are stored without zeros, by name, as JSON."""

CHECKSUM = "wanda_lightning.sha256"
"""Key of a file's metadata: the SHA-256 of all that stands behind its header."""

HEADER = "wanda_lightning.sha256_of_header"
"""Key of a file's metadata: the SHA-256 of the rest of its header."""

VALUES, BITMASK, SIGNS = PARTS = ".values", ".bitmask", ".zero_signs"


def compress_file(source: Path, target: Path) -> None:
    """Write a safetensors file again, without the zeros of its tensors.

    Args:
        source: The file.
        target: The file to write.

    Raises:
        ValueError: If the file is damaged, or holds names that compression gives to parts of tensors.
    """
    with opened(source) as tensors:
        names_by_width, entries, metadata = _compressed(source, tensors)
        # Once more, to write: all parts together may not fit into memory, and the header comes first.
        every = (part for name in names_by_width for part in _take_apart(name, tensors.get_tensor(name)).values())
        write_tensors(target, entries, every, metadata)


def compressed_file_size(source: Path) -> int:
    """Return how many bytes :func:`compress_file` would write for a safetensors file."""
    with opened(source) as tensors:
        _, entries, metadata = _compressed(source, tensors)
        return size_of(entries, metadata)


def size_of(entries: Sequence[Entry], metadata: dict[str, str]) -> int:
    """Return the bytes of a safetensors file, from what its header says."""
    return len(header_of(entries, metadata)) + sum(entry.nbytes for entry in entries)


def parts_of(stored: Entry, kept: int) -> list[Entry]:
    """Say how a tensor with so many values that are not zero, and no -0.0, is stored; alone if that is not smaller."""
    flags, width = _packed_size(prod(stored.shape)), stored.nbytes // max(1, prod(stored.shape))
    if kept * width + flags >= stored.nbytes:
        return [stored]
    values = Entry(stored.name + VALUES, stored.dtype, [kept], kept * width)
    return [values, Entry(stored.name + BITMASK, "U8", [flags], flags)]


def decompress_file(source: Path, target: Path) -> None:
    """Undo :func:`compress_file`.

    Args:
        source: A compressed file.
        target: The file to write.

    Raises:
        ValueError: If the file is damaged.
    """
    with opened(source) as tensors:
        shapes = _checked_shapes(source, tensors)
        names = _ordered(tensors, _names(tensors, shapes))
        entries = []
        for name in names:
            stored = name + VALUES if name in shapes else name
            tensor, dtype = tensors.get_tensor(stored), tensors.get_slice(stored).get_dtype()
            shape = shapes.get(name, tensor.shape)
            entries.append(Entry(name, dtype, shape, prod(shape) * tensor.element_size()))
        arrays = (_bits(_read(tensors, name, shapes.get(name))) for name in names)
        metadata = {key: value for key, value in tensors.metadata().items() if key not in (SHAPES, CHECKSUM, HEADER)}
        write_tensors(target, entries, arrays, metadata)


def read_compressed(source: Path) -> dict[str, Tensor]:
    """Read all tensors of a compressed file, with their zeros.

    Args:
        source: A compressed file.

    Returns:
        The tensors by name.

    Raises:
        ValueError: If the file is damaged.
    """
    with opened(source) as tensors:
        shapes = _checked_shapes(source, tensors)
        return {name: _read(tensors, name, shapes.get(name)) for name in _names(tensors, shapes)}


def _compressed(source: Path, tensors: Any) -> tuple[list[str], list[Entry], dict[str, str]]:
    """Return the tensors in the order of the compressed file, and what its header says."""
    names = set(tensors.keys())
    if clash := {name for name in names if {name + part for part in PARTS} & names}:
        raise ValueError(f"{source} has tensors of the names that compression would give to parts of {clash}")
    names_by_width = _ordered(tensors, names)
    checksum = hashlib.sha256()
    entries: list[Entry] = []
    shapes: dict[str, list[int]] = {}
    for name in names_by_width:
        tensor, dtype = tensors.get_tensor(name), tensors.get_slice(name).get_dtype()
        parts = _take_apart(name, tensor)
        for part in parts.values():
            checksum.update(part.data)
        if name in parts:
            entries.append(Entry(name, dtype, tensor.shape, tensor.nbytes))
        else:
            shapes[name] = list(tensor.shape)
            types = {name + VALUES: dtype}
            entries += [Entry(n, types.get(n, "U8"), part.shape, part.nbytes) for n, part in parts.items()]
    metadata = (tensors.metadata() or {}) | {SHAPES: json.dumps(shapes), CHECKSUM: checksum.hexdigest()}
    return names_by_width, entries, metadata | {HEADER: _header_checksum(header_of(entries, metadata)[8:])}


def _take_apart(name: str, tensor: Tensor) -> dict[str, NDArray[Any]]:
    """Return the parts of a tensor by name, or the tensor as it is if they would not be smaller."""
    bits = _bits(tensor)
    negative_zero = bits == np.iinfo(bits.dtype).min  # what multiplying by a mask makes of negative weights
    kept = (bits != 0) & ~negative_zero
    count, signed = int(np.count_nonzero(kept)), bool(negative_zero.any())
    flags = _packed_size(len(bits)) + (_packed_size(len(bits) - count) if signed else 0)
    if count * bits.itemsize + flags >= bits.nbytes:
        return {name: bits}
    parts = {name + VALUES: bits[kept], name + BITMASK: _packed(kept)}
    return parts | {name + SIGNS: _packed(negative_zero[~kept])} if signed else parts


def _checked_shapes(source: Path, tensors: Any) -> dict[str, list[int]]:
    """Return the shapes of the tensors that were taken apart; refuse a file whose contents are not what was written.

    One that comes without a checksum may be read.
    """
    metadata = tensors.metadata() or {}
    with source.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        of_header = _header_checksum(file.read(size))
        if metadata.get(HEADER, of_header) != of_header or (
            CHECKSUM in metadata and metadata[CHECKSUM] != hashlib.file_digest(file, "sha256").hexdigest()
        ):
            raise ValueError(f"{source} is damaged, its checksum is another one: copy or download it again")
    if SHAPES not in metadata:
        raise ValueError(f"{source} was not written by wanda-lightning compress: it says nothing of how it was")
    return json.loads(metadata[SHAPES])


def _header_checksum(header: bytes) -> str:
    """Return the checksum of what a header says, without that checksum."""
    said = json.loads(header)
    said.get("__metadata__", {}).pop(HEADER, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _read(tensors: Any, name: str, shape: Sequence[int] | None) -> Tensor:
    """Read a tensor with its zeros; ``shape`` is None if it is stored with them."""
    if shape is None:
        return tensors.get_tensor(name)
    values = tensors.get_tensor(name + VALUES)
    kept = _unpacked(tensors.get_tensor(name + BITMASK), prod(shape))
    if int(np.count_nonzero(kept)) != len(values):
        raise ValueError(f"the compressed tensor {name} is damaged: its mask and its values do not fit together")
    tensor = torch.zeros(shape, dtype=values.dtype, device=values.device)
    bits = _bits(tensor)
    bits[kept] = _bits(values)
    if name + SIGNS in tensors.keys():  # noqa: SIM118 (not a dict)
        negative = _unpacked(tensors.get_tensor(name + SIGNS), len(kept) - len(values))
        bits[~kept] = np.where(negative, np.iinfo(bits.dtype).min, 0)
    return tensor


def _bits(tensor: Tensor) -> NDArray[Any]:
    """View a contiguous tensor as a row of whole numbers with the same bits."""
    return tensor.reshape(-1).view(INTEGERS[tensor.element_size()]).numpy()


def _packed_size(count: int) -> int:
    """Bytes that booleans take, eight to a byte, in steps of eight bytes: what follows stays aligned."""
    return -(-count // 64) * 8


def _packed(flags: NDArray[Any]) -> NDArray[Any]:
    packed = np.packbits(flags)
    return np.pad(packed, (0, _packed_size(len(flags)) - len(packed)))


def _unpacked(packed: Tensor, count: int) -> NDArray[Any]:
    return np.unpackbits(packed.numpy(), count=count).view(bool)


def _ordered(tensors: Any, names: set[str]) -> list[str]:
    """Sort as safetensors does, wide types first: then everything is aligned."""

    def width(name: str) -> int:
        return tensors.get_tensor(name if name in stored else name + VALUES).element_size()

    stored = set(tensors.keys())
    return sorted(names, key=lambda name: (-width(name), name))


def _names(tensors: Any, shapes: dict[str, list[int]]) -> set[str]:
    """Names of the tensors of a compressed file, as they were."""
    return set(tensors.keys()) - {name + part for name in shapes for part in PARTS} | set(shapes)
