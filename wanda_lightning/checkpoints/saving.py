"""Saving a pruned model so that ``from_pretrained`` loads it, whole or not at all."""

import logging
import shutil
import tempfile
import warnings
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from wanda_lightning.atomic_files import whole_folder
from wanda_lightning.checkpoints.folders import place_for
from wanda_lightning.checkpoints.quiet import quiet, without_progress_bars
from wanda_lightning.checkpoints.saving_check import check_can_be_saved, check_weights_can_be_saved
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.language_model import find_language_model
from wanda_lightning.model.offload import is_offloaded, stored_tensor, stored_tensors
from wanda_lightning.training.lora import has_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def save_pretrained(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", folder: str | Path) -> Path:
    """Write a model as plain safetensors, with its zeros, and make sure that it loads again as it was.

    The files are written to a temporary folder beside the wanted one, read back and compared, and only then moved
    into place; an older model there is replaced. Needs free space for both.

    Args:
        model: The model, also compiled, or in a wrapper for several devices.
        tokenizer: Saved beside it, if given. Settings of processors of images or sound are copied from where the model
            was loaded.
        folder: Where it goes; made if needed.

    Returns:
        The folder.

    Raises:
        RuntimeError: If what was written does not load as the same weights.
        ValueError: If the folder holds other things than a model; if the model has adapters, which are not part of its
            weights, or cannot be saved for other reasons that
            :func:`wanda_lightning.checkpoints.saving_check.check_can_be_saved` finds.
    """
    folder = place_for(folder)
    model = cast("PreTrainedModel", find_language_model(model))
    if has_adapters(model):
        raise ValueError(
            "the model has adapters, and merging them would fill the zeros of its weights: save them beside the pruned "
            "model with PruningTrainer.save_pretrained, or merge under the mask with wanda_lightning.merge_masked"
        )
    check_can_be_saved(model, tokenizer)
    with whole_folder(folder) as unfinished:
        _write(model, unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        _take_along(model, unfinished)
        _check_reloads(model, unfinished)
    return folder


def save_weights(model: nn.Module, folder: str | Path) -> Path:
    """Write the state dict of any module to ``model.safetensors``, whole or not at all, and compare what was written.

    ``safetensors.torch.load_model(module, file)`` loads it, also where weights share memory.

    Args:
        model: The module.
        folder: Where it goes; made if needed, an older one is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: If it has no weights, or the folder holds other things than a model.
        RuntimeError: If what was written are not the same weights.
    """
    if not model.state_dict():
        raise ValueError(
            f"{type(model).__name__} has no weights to save. If it loads them in configure_model, run fit or validate "
            "first, and with several processes use strategy='ddp', whose first process is this one"
        )
    check_weights_can_be_saved(model)
    folder = place_for(folder)
    with whole_folder(folder) as unfinished:
        save_model(model, str(unfinished / "model.safetensors"))
        state = model.state_dict()
        for name, written in load_file(unfinished / "model.safetensors").items():
            if not _same(state[name].cpu(), written):
                raise RuntimeError(f"the saved weights are not those of the model: {name} differs")
    return folder


def _write(model: "PreTrainedModel", folder: Path) -> None:
    if not is_offloaded(model):
        with without_progress_bars():  # it would count shards, of which there is hardly ever a second
            model.save_pretrained(folder)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, max_shard_size=_largest_layer(model))  # read and written a file at a time


def _take_along(model: "PreTrainedModel", folder: Path) -> None:
    """Copy how images and sounds are prepared from where a model was loaded; the model does not know."""
    from huggingface_hub import snapshot_download
    from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

    names = [PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME]
    takes_text_alone = model.main_input_name == "input_ids" and model.config.get_text_config() is model.config
    if takes_text_alone or not model.name_or_path or any((folder / name).exists() for name in names):
        return
    source, revision = Path(model.name_or_path), getattr(model.config, "_commit_hash", None)
    if not source.is_dir():
        try:
            source = Path(snapshot_download(model.name_or_path, revision=revision, allow_patterns=names))
        except (OSError, ValueError) as error:
            log.warning("settings of processors, if %s has any, are not saved (%r)", model.name_or_path, error)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _largest_layer(model: "PreTrainedModel") -> int:
    """Return the bytes of the largest decoder layer: so much of the model is in memory while it is pruned, too."""
    layers = decoder_layers(model, targets=["*"])
    return max(sum(p.nbytes for p in layer.module.parameters()) for layer in layers)


def _check_reloads(model: "PreTrainedModel", folder: Path) -> None:
    """Compare with what transformers makes of the files, a weight at a time: no second model is in memory."""
    widest = reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as converted,  # deleted with the unfinished folder at the latest
        quiet("accelerate.big_modeling"),  # it warns that weights are offloaded
        without_progress_bars(),
    ):
        reloaded = type(model).from_pretrained(
            folder, dtype=widest, device_map={"": "disk"}, offload_folder=converted, local_files_only=True
        )
        if model.state_dict().keys() != reloaded.state_dict().keys():
            raise RuntimeError("the saved model does not load as it was: it has other weights")
        for name, saved in stored_tensors(model):  # by name: what was taken out and put back is the last of its module
            if not _same(saved.cpu(), stored_tensor(reloaded, name).cpu().to(saved.dtype)):
                raise RuntimeError(f"the saved model does not load as it was: {name} differs")


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN, which a linear that was left out may have, is the same as NaN."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
