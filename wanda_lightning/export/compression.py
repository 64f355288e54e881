"""Storing a pruned model without its zeros, to ship it: a bit for every weight, and the values that are not zero.

The round trip is exact to the bit. Files are worked on tensor by tensor, so the model need not fit into memory.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from wanda_lightning.atomic_files import whole_folder
from wanda_lightning.checkpoints.folders import model_folder
from wanda_lightning.checkpoints.tensor_files import COMPRESSED, PLAIN, weight_files
from wanda_lightning.export.bitmask import compress_file, decompress_file, read_compressed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTE = "COMPRESSED.md"


class Sizes(NamedTuple):
    """Bytes of the weight files that were read, and of those that were written."""

    read: int
    written: int

    def __str__(self) -> str:
        return f"{self.read / 1e6:,.1f} MB -> {self.written / 1e6:,.1f} MB ({self.written / self.read:.3f})"


def compress(folder: str | Path, output: str | Path) -> Sizes:
    """Write a copy of a pruned model without its zeros.

    A matrix becomes a mask of one bit for each weight, and the values that are not zero. If some zeros are -0.0, the
    signs of the zeros are stored too. Tensors that would not get smaller stay as they are. Other files are copied.

    Args:
        folder: A model with safetensors weights, or the run that saved one.
        output: Folder of the compressed model; must not exist, nor lie in the other.

    Returns:
        Sizes of the weights before and after.

    Raises:
        ValueError: If the folder has no such weights, or the output exists or lies in it.
    """
    folder = Path(model_folder(folder)).expanduser()
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no weights as model.safetensors or model.safetensors.index.json")
    note = (
        "The weights are stored without their zeros; transformers does not read them as they are. "
        "`wanda-lightning decompress FOLDER OUTPUT` restores the files, and "
        "`wanda_lightning.load_compressed(FOLDER)` loads the model.\n"
    )
    return _convert(folder, files, Path(output), COMPRESSED, compress_file, note)


def decompress(folder: str | Path, output: str | Path) -> Sizes:
    """Undo :func:`compress`: write a model that ``from_pretrained`` loads.

    Args:
        folder: A compressed model.
        output: Folder of the ordinary model; must not exist, nor lie in the other.

    Returns:
        Sizes of the weights before and after.

    Raises:
        ValueError: If the folder holds no compressed model, or the output exists or lies in it.
    """
    folder = Path(folder).expanduser()
    return _convert(folder, _compressed_files(folder), Path(output), PLAIN, decompress_file, None)


def load_compressed(folder: str | Path, **kwargs: Any) -> "PreTrainedModel":
    """Load a compressed model into memory, without writing it to disk.

    Args:
        folder: A compressed model.
        kwargs: Passed on to ``from_pretrained``.

    Returns:
        The model, in eval mode, with ordinary dense weights.

    Raises:
        ValueError: If the folder holds no compressed model.
    """
    from transformers import GenerationConfig

    from wanda_lightning.checkpoints.loading import build_skeleton, load_config

    folder = Path(folder).expanduser()
    weights: dict[str, Tensor] = {}
    for file in _compressed_files(folder):
        weights |= read_compressed(file)
    trusted = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    config = load_config(folder, **trusted)
    family: Any = type(build_skeleton(config, **trusted))
    model = family.from_pretrained(None, config=config, state_dict=weights, **{"dtype": config.dtype, **kwargs})
    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _compressed_files(folder: Path) -> list[Path]:
    files = weight_files(folder, COMPRESSED)
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
    output = output.expanduser()
    if output.exists():
        raise ValueError(f"{output} exists already: name a new folder")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{output} lies in {folder}, and would be copied into itself: name a folder outside of it")
    with whole_folder(output.absolute()) as new:
        others = shutil.ignore_patterns(*(file.name for file in files), NOTE)
        shutil.copytree(folder, new, ignore=others, dirs_exist_ok=True)
        if note:
            (new / NOTE).write_text(note, encoding="utf-8")
        written = [new / (file.name.removesuffix(COMPRESSED).removesuffix(PLAIN) + suffix) for file in files]
        for file, target in zip(files, written, strict=True):
            convert_file(file, target)
        return Sizes(*(sum(file.stat().st_size for file in some) for some in (files, written)))
