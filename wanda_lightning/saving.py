"""Saving a pruned model so that ``from_pretrained`` loads it, whole or not at all."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wanda_lightning.lora import has_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_pretrained(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", folder: str | Path) -> Path:
    """Write a model as plain safetensors, with its zeros, and make sure that it loads again as it was.

    The files are written to a temporary folder beside the wanted one, read back and compared, and only then moved
    into place; an older model there is replaced. Needs free space for both.

    Args:
        model: The model.
        tokenizer: Saved beside it, if given.
        folder: Where it goes; made if needed.

    Returns:
        The folder.

    Raises:
        RuntimeError: If what was written does not load as the same weights.
        ValueError: If the model has adapters, which are not part of its weights.
    """
    if has_adapters(model):
        raise ValueError(
            "the model has adapters, and merging them would fill the zeros of its weights: save them beside the pruned "
            "model with PruningTrainer.save_pretrained, or merge under the mask with wanda_lightning.lora.merge_masked"
        )
    folder = Path(folder).expanduser().resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        _check_reloads(model, unfinished)
        _replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _check_reloads(model: "PreTrainedModel", folder: Path) -> None:
    reloaded = type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True)
    saved = dict(model.named_parameters())
    loaded = dict(reloaded.named_parameters())
    if different := [n for n in saved.keys() | loaded.keys() if not _same(saved.get(n), loaded.get(n))]:
        raise RuntimeError(f"the saved model does not load as it was: {len(different)} weights differ, {different[:3]}")


def _same(saved: torch.Tensor | None, loaded: torch.Tensor | None) -> bool:
    return saved is not None and loaded is not None and torch.equal(saved.detach().cpu(), loaded.detach())


def _replace(new: Path, folder: Path) -> None:
    """Rename a folder over another; the old one is only removed when the new one is in place."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)) / "old"
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old.parent)
    else:
        new.rename(folder)
