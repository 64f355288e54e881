"""Loading a model and its tokenizer: by hub name, from a folder, or from a GGUF file."""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wanda_lightning.saving import save_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_model(pretrained: str, dtype: str = "auto", **kwargs: Any) -> "PreTrainedModel":
    """Load a causal language model with ordinary, dense weights.

    Args:
        pretrained: A hub name, a folder written by ``save_pretrained``, or a ``.gguf`` file, which is de-quantised.
        dtype: ``"auto"`` (the checkpoint's own), or the name of a torch dtype.
        kwargs: Passed on to ``from_pretrained``.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: If there is no such model.
    """
    from transformers import AutoModelForCausalLM

    folder = _folder(pretrained)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **kwargs
        )
    except OSError as error:
        raise _not_found("model", pretrained, error) from error


def load_config(pretrained: str, **kwargs: Any) -> "PreTrainedConfig":
    """Load the config of a model and nothing else; see :func:`load_model`."""
    from transformers import AutoConfig

    folder = _folder(pretrained)
    try:
        return AutoConfig.from_pretrained(folder, **kwargs)
    except OSError as error:
        raise _not_found("config", pretrained, error) from error


def load_tokenizer(pretrained: str, **kwargs: Any) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to a model; see :func:`load_model`."""
    from transformers import AutoTokenizer

    folder = _folder(pretrained)
    try:
        return AutoTokenizer.from_pretrained(folder, **kwargs)
    except OSError as error:
        raise _not_found("tokenizer", pretrained, error) from error


def _folder(pretrained: str) -> str:
    """Return what ``from_pretrained`` takes; a GGUF file is converted to a folder first."""
    path = Path(pretrained).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no such GGUF file: {pretrained}")
        return str(_converted(path))
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{pretrained} is no model folder: it holds no config.json (a file must end in .gguf)")
    return str(path) if path.exists() else pretrained


def _converted(gguf: Path) -> Path:
    """De-quantise a GGUF file to a folder, once: reading one takes transformers a minute for a small model."""
    from huggingface_hub import cached_assets_path
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = gguf.resolve()
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cached_assets_path("wanda_lightning", namespace="gguf", subfolder=key) / "model"
    if folder.exists():
        return folder
    log.info("de-quantising %s, once, to %s", gguf, folder)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    save_pretrained(model, AutoTokenizer.from_pretrained(**source), folder)
    return folder


def _not_found(what: str, pretrained: str, error: OSError) -> ValueError:
    reason = str(error).strip().splitlines()[0]
    return ValueError(
        f"cannot load the {what} of {pretrained!r}: it is no local folder or .gguf file, "
        f"and could not be had from the hub ({reason})"
    )
