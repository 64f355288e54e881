"""Loading a model and its tokenizer: by hub name, from a folder, or from a GGUF file."""

import hashlib
import logging
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wanda_lightning.arguments import checked_dtype
from wanda_lightning.checkpoints.auto_class import auto_class
from wanda_lightning.checkpoints.folders import check_place, model_folder
from wanda_lightning.checkpoints.quantization import dense_settings, forget_quantization
from wanda_lightning.checkpoints.quiet import quiet
from wanda_lightning.checkpoints.saving import save_pretrained
from wanda_lightning.checkpoints.tensor_files import COMPRESSED, opened, weight_files
from wanda_lightning.checkpoints.whole import check_whole
from wanda_lightning.model.decoder import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_model(pretrained: str | Path, dtype: str | torch.dtype = "auto", **kwargs: Any) -> "PreTrainedModel":
    """Load a causal language model with ordinary, dense weights.

    Args:
        pretrained: A hub name, a folder written by ``save_pretrained``, the folder of a run, or a ``.gguf`` file. GGUF,
            FP8 and MXFP4 are de-quantised.
        dtype: ``"auto"`` (the checkpoint's own), or a floating-point dtype of torch of at least 16 bits, or its name.
        kwargs: Passed on to ``from_pretrained``.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: If there is no such model, it is no causal language model, it is quantised in another way, its files
            are damaged, lack some of its weights or have them in other shapes, or there is no such dtype.
    """
    wanted, pretrained, run = checked_dtype(dtype), model_folder(pretrained), Path(pretrained).expanduser()
    if pretrained == str(run / "model") and (run / "adapter").is_dir():
        log.warning("%s is loaded without %s, which peft.PeftModel.from_pretrained adds", pretrained, run / "adapter")
    if any(Path(pretrained).expanduser().glob(f"*{COMPRESSED}")):
        raise ValueError(
            f"{pretrained} is stored without its zeros: restore it with `wanda-lightning decompress {pretrained} "
            "OUTPUT`, or load it with wanda_lightning.load_compressed"
        )
    config = load_config(pretrained, **kwargs)
    dequantized = dense_settings(config, pretrained, kwargs.get("quantization_config"))
    if dequantized and wanted not in (None, torch.bfloat16) and "offload_folder" in kwargs:
        raise ValueError(f"{pretrained} is de-quantised to bfloat16 where it is streamed, got dtype {dtype!r}")
    folder = _folder(pretrained)
    for file in weight_files(Path(folder)) if Path(folder).is_dir() else []:
        with opened(file):  # whose error names the file; transformers' does not
            pass
    settings = kwargs | dequantized | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = auto_class(config).from_pretrained(folder, dtype=wanted or "auto", **settings)
    except OSError as error:
        raise _not_found("model", pretrained, error) from error
    check_whole(model, info, pretrained, any_size=kwargs.get("ignore_mismatched_sizes", False))
    forget_quantization(model)
    if dequantized and wanted is not None:
        for parameter in model.parameters():  # transformers de-quantises to bfloat16, whatever is asked for
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.to(wanted)
    return model


def load_streamed(
    pretrained: str | Path, dtype: str | torch.dtype = "auto", device: torch.device | str = "cpu", **kwargs: Any
) -> "PreTrainedModel":
    """Open a causal language model whose decoder layers stay on disk, for models that are larger than memory.

    Embeddings, norms and head are loaded. Calls of the model load its layers a linear at a time, by accelerate's hooks;
    :func:`wanda_lightning.prune_model` loads them a layer at a time. Where transformers stores the experts of a mixture
    in another way than the files have them, they are written once more, to a temporary folder in the hub's cache, or
    where HF_ASSETS_CACHE says.

    Args:
        pretrained: See :func:`load_model`.
        dtype: See :func:`load_model`.
        device: Where it computes.
        kwargs: Passed on to ``from_pretrained``.

    Returns:
        The model, in eval mode; it cannot be trained.

    Raises:
        ValueError: If there is no such model, or no decoder layers in it.
        OSError: If there is no room for what is written once more.
    """
    from huggingface_hub import cached_assets_path
    from safetensors import SafetensorError

    config = load_config(pretrained, **kwargs)
    skeleton = build_skeleton(config, trust_remote_code=kwargs.get("trust_remote_code", False))
    layers = decoder_layers(skeleton, targets=["*"])[0].list_name
    converted = tempfile.TemporaryDirectory(dir=cached_assets_path("wanda_lightning", namespace="streamed"))
    try:
        with quiet("accelerate.big_modeling"):  # it warns that weights are offloaded
            model = load_model(
                pretrained,
                dtype,
                device_map={layers: "disk", **{name: str(device) for name in _beside(skeleton, layers)}},
                offload_folder=converted.name,
                **kwargs,
            )
    except BaseException as error:
        converted.cleanup()
        if isinstance(error, SafetensorError):  # which does not say where it wrote
            raise OSError(
                f"{pretrained} cannot be written once more to {converted.name}: {error}. Make room there, or let "
                "HF_ASSETS_CACHE name another folder"
            ) from error
        raise
    weakref.finalize(model, converted.cleanup)
    return model


def _beside(module: "torch.nn.Module", inner: str, name: str = "") -> Iterator[str]:
    """Yield the names of the largest parts of a module that do not hold the inner one."""
    if name == inner:
        return
    if name and not inner.startswith(f"{name}."):
        yield name
        return
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    yield from (f"{name}.{each}".removeprefix(".") for each, _ in own)
    for child_name, child in module.named_children():
        yield from _beside(child, inner, f"{name}.{child_name}".removeprefix("."))


def build_skeleton(config: "PreTrainedConfig", **kwargs: Any) -> "PreTrainedModel":
    """Build the model that a config describes on the meta device, where weights take no memory.

    Args:
        config: Config of a causal language model, or of one that sees images too.
        kwargs: Passed on to ``from_config``.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: If it describes another kind of model.
    """
    with torch.device("meta"):
        return auto_class(config).from_config(config, **kwargs).eval()


def load_config(pretrained: str | Path, **kwargs: Any) -> "PreTrainedConfig":
    """Load the config of a model and nothing else; refuse the models that :func:`load_model` refuses."""
    from transformers import AutoConfig

    pretrained = model_folder(pretrained)
    folder = _folder(pretrained)
    try:
        config = AutoConfig.from_pretrained(folder, **kwargs)
    except OSError as error:
        raise _not_found("config", pretrained, error) from error
    except (AttributeError, KeyError, TypeError) as error:  # as of a data type that torch does not have
        raise ValueError(f"cannot read the config of {pretrained!r}: {error} ({type(error).__name__})") from error
    dense_settings(config, pretrained, kwargs.get("quantization_config"))
    return config


def load_tokenizer(pretrained: str | Path, **kwargs: Any) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to a model, or one that is in a folder by itself.

    Args:
        pretrained: See :func:`load_model`; or a folder that holds only a tokenizer.
        kwargs: Passed on to ``from_pretrained``.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    pretrained = model_folder(pretrained)
    local = Path(pretrained).expanduser().is_dir()
    folder = str(Path(pretrained).expanduser()) if local else _folder(pretrained)
    try:
        return AutoTokenizer.from_pretrained(folder, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and not local:
            raise _not_found("tokenizer", pretrained, error) from error
        raise ValueError(
            f"{pretrained!r} holds no tokenizer that can be loaded: save one there, or name another with "
            f"TextDataModule(tokenizer=...) or --data.tokenizer ({str(error).strip().splitlines()[0]})"
        ) from error


def _folder(pretrained: str) -> str:
    """Return what ``from_pretrained`` takes; a GGUF file is converted to a folder first."""
    check_place(pretrained)
    path = Path(pretrained).expanduser()
    if path.suffix == ".gguf":
        return str(_converted(path))
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
    if Path(pretrained).expanduser().exists():
        return ValueError(f"cannot load the {what} of {pretrained!r}: {reason}")
    return ValueError(
        f"cannot load the {what} of {pretrained!r}: there is no such folder here, "
        f"and it could not be had from the hub ({reason})"
    )
