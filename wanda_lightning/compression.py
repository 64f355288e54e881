"""Storing a pruned model without its zeros, to ship it: a bit for every weight, and the values that are not zero.

The round trip is exact to the bit. Files are worked on tensor by tensor, so the model need not fit into memory.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanda_lightning.checkpoint import PLAIN, Entry, opened, weight_files, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES = "wanda_lightning.compressed"
"""Key of a file's metadata: the shapes of the tensors that are stored without zeros, by name, as JSON."""

COMPRESSED = ".compressed.safetensors"  # from_pretrained must not take these files for ordinary weights
VALUES, BITMASK = ".values", ".bitmask"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NOTE = "COMPRESSED.md"


class Sizes(NamedTuple):
    """Bytes of the weight files that were read, and of those that were written."""

    read: int
    written: int

    def __str__(self) -> str:
        return f"{self.read / 1e6:,.1f} MB -> {self.written / 1e6:,.1f} MB ({self.written / self.read:.3f})"


def compress(folder: str, output: str) -> Sizes:
    """Write a copy of a pruned model without its zeros.

    A matrix becomes a mask of one bit a weight, and the values that are not zero; tensors that would not get smaller
    stay as they are. Zero is what has no bit set: -0.0 is kept. Other files are copied.

    Args:
        folder: A model with safetensors weights.
        output: Folder of the compressed model; must not exist.

    Returns:
        Sizes of the weights before and after.

    Raises:
        ValueError: If the folder has no such weights, or the output exists.
    """
    files = weight_files(Path(folder))
    if not files:
        raise ValueError(f"{folder} holds no weights as model.safetensors or model.safetensors.index.json")
    note = (
        "The weights are stored without their zeros; transformers does not read them as they are. "
        "`wanda-lightning decompress FOLDER OUTPUT` restores the files, and "
        "`wanda_lightning.compression.load_compressed(FOLDER)` loads the model.\n"
    )
    return _convert(Path(folder), files, Path(output), COMPRESSED, _compress_file, note)


def decompress(folder: str, output: str) -> Sizes:
    """Undo :func:`compress`: write a model that ``from_pretrained`` loads.

    Args:
        folder: A compressed model.
        output: Folder of the ordinary model; must not exist.

    Returns:
        Sizes of the weights before and after.

    Raises:
        ValueError: If the folder holds no compressed model, or the output exists.
    """
    return _convert(Path(folder), _compressed_files(folder), Path(output), PLAIN, _decompress_file, None)


def load_compressed(folder: str, **kwargs: Any) -> "PreTrainedModel":
    """Load a compressed model into memory, without writing it to disk.

    Args:
        folder: A compressed model.
        kwargs: Passed on to ``from_pretrained``.

    Returns:
        The model, in eval mode, with ordinary dense weights.

    Raises:
        ValueError: If the folder holds no compressed model.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from wanda_lightning.loading import load_config

    weights: dict[str, Tensor] = {}
    for file in _compressed_files(folder):
        with opened(file) as tensors:
            shapes = _shapes(tensors)
            weights |= {name: _read(tensors, name, shapes.get(name)) for name in _names(tensors)}
    config = load_config(folder)
    with torch.device("meta"):
        family = type(AutoModelForCausalLM.from_config(config))
    model = family.from_pretrained(None, config=config, state_dict=weights, **{"dtype": config.dtype, **kwargs})
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _compressed_files(folder: str) -> list[Path]:
    files = weight_files(Path(folder), COMPRESSED)
    if not files:
        raise ValueError(f"{folder} is no compressed model: it holds no *{COMPRESSED}")
    return files


def _convert(
    folder: Path,
    files: Sequence[Path],
    output: Path,
    suffix: str,
    convert_file: Callable[[Path, Path], None],
    note: str | None,
) -> Sizes:
    """Convert a folder's weight files and copy the others; the output appears when all is there."""
    if output.exists():
        raise ValueError(f"{output} exists already: name a new folder")
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as unfinished:
        new = Path(unfinished) / "model"
        shutil.copytree(folder, new, ignore=shutil.ignore_patterns(*(file.name for file in files), NOTE))
        if note:
            (new / NOTE).write_text(note, encoding="utf-8")
        written = [new / (file.name.removesuffix(COMPRESSED).removesuffix(PLAIN) + suffix) for file in files]
        for file, target in zip(files, written, strict=True):
            convert_file(file, target)
        sizes = Sizes(*(sum(file.stat().st_size for file in some) for some in (files, written)))
        new.rename(output)
    return sizes


def _compress_file(source: Path, target: Path) -> None:
    with opened(source) as tensors:
        names = set(tensors.keys())
        if clash := {name for name in names if {name + VALUES, name + BITMASK} & names}:
            raise ValueError(f"{source} has tensors of the names that compression would give to parts of {clash}")
        entries: list[Entry] = []
        shapes: dict[str, list[int]] = {}
        for name in _ordered(tensors, names):
            tensor, dtype = tensors.get_tensor(name), tensors.get_slice(name).get_dtype()
            kept = int(np.count_nonzero(_bits(tensor)))
            values = Entry(name + VALUES, dtype, [kept], kept * tensor.element_size())
            mask_bytes = -(-tensor.numel() // 64) * 8  # in steps of 8, so that what follows stays aligned
            if values.nbytes + mask_bytes < tensor.nbytes:
                entries += [values, Entry(name + BITMASK, "U8", [mask_bytes], mask_bytes)]
                shapes[name] = list(tensor.shape)
            else:
                entries.append(Entry(name, dtype, tensor.shape, tensor.nbytes))

        def arrays() -> Iterator[NDArray[Any]]:
            for name in _ordered(tensors, names):
                bits = _bits(tensors.get_tensor(name))
                if name in shapes:
                    kept = bits != 0
                    yield bits[kept]
                    yield np.packbits(np.pad(kept, (0, -len(kept) % 64)))
                else:
                    yield bits

        write_tensors(target, entries, arrays(), {**(tensors.metadata() or {}), SHAPES: json.dumps(shapes)})


def _decompress_file(source: Path, target: Path) -> None:
    with opened(source) as tensors:
        shapes = _shapes(tensors)
        names = _ordered(tensors, _names(tensors))
        entries = []
        for name in names:
            stored = name + VALUES if name in shapes else name
            tensor, dtype = tensors.get_tensor(stored), tensors.get_slice(stored).get_dtype()
            shape = shapes.get(name, tensor.shape)
            entries.append(Entry(name, dtype, shape, prod(shape) * tensor.element_size()))
        arrays = (_bits(_read(tensors, name, shapes.get(name))) for name in names)
        metadata = {key: value for key, value in tensors.metadata().items() if key != SHAPES}
        write_tensors(target, entries, arrays, metadata)


def _read(tensors: Any, name: str, shape: Sequence[int] | None) -> Tensor:
    """Read a tensor with its zeros; ``shape`` is None if it is stored with them."""
    if shape is None:
        return tensors.get_tensor(name)
    values, mask = tensors.get_tensor(name + VALUES), tensors.get_tensor(name + BITMASK)
    kept = np.unpackbits(mask.numpy(), count=prod(shape)).view(bool)
    if int(np.count_nonzero(kept)) != len(values):
        raise ValueError(f"the compressed tensor {name} is damaged: its mask and its values do not fit together")
    tensor = torch.zeros(shape, dtype=values.dtype)
    _bits(tensor)[kept] = _bits(values)
    return tensor


def _bits(tensor: Tensor) -> NDArray[Any]:
    """View a contiguous tensor as a row of whole numbers with the same bits."""
    return tensor.reshape(-1).view(BITS[tensor.element_size()]).numpy()


def _ordered(tensors: Any, names: set[str]) -> list[str]:
    """Sort as safetensors does, wide types first: then everything is aligned."""

    def width(name: str) -> int:
        return tensors.get_tensor(name if name in stored else name + VALUES).element_size()

    stored = set(tensors.keys())
    return sorted(names, key=lambda name: (-width(name), name))


def _names(tensors: Any) -> set[str]:
    """Names of the tensors of a compressed file, as they were."""
    shapes = _shapes(tensors)
    return set(tensors.keys()) - {name + part for name in shapes for part in (VALUES, BITMASK)} | set(shapes)


def _shapes(tensors: Any) -> dict[str, list[int]]:
    return json.loads((tensors.metadata() or {})[SHAPES])


def compress_command(arguments: list[str]) -> None:
    """Run ``wanda-lightning compress``."""
    _run(compress, arguments)


def decompress_command(arguments: list[str]) -> None:
    """Run ``wanda-lightning decompress``."""
    _run(decompress, arguments)


def _run(convert: Callable[[str, str], Sizes], arguments: list[str]) -> None:
    from jsonargparse import auto_cli

    print(auto_cli(convert, args=arguments, prog=f"wanda-lightning {convert.__name__}"))
