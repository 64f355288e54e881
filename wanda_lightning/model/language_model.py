"""The Hugging Face model that a module is or holds."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def find_language_model(module: nn.Module) -> nn.Module:
    """Find the Hugging Face model that a module is or holds.

    Args:
        module: A model of transformers (also with adapters, or compiled), or any module (such as a LightningModule)
            that holds exactly one. Another form of the same weights beside it, such as a compiled or adapted one, or
            the model's own decoder, is no second model; nor is a frozen one, such as a teacher, beside one that trains.

    Returns:
        The outermost model; if it is compiled, or set up by Lightning's Fabric, its original.

    Raises:
        ValueError: If there is none, or more than one side by side, or it is no module.
    """
    every = uncompiled(module).named_modules()
    found = {uncompiled(child): name for name, child in every if is_of_transformers(child)}
    held = {model: set(model.parameters()) for model in found}
    model = _that_holds_all(held)
    if model is None:
        model = _that_holds_all({m: own for m, own in held.items() if any(p.requires_grad for p in own)})
    if model is None:
        outermost = [m for m in found if not any(held[m] < held[other] for other in found)]
        names = ", ".join(f"{found[m]} ({type(m).__name__})" for m in outermost) or "none"
        raise ValueError(
            f"{type(module).__name__} must hold exactly one transformers model to prune, found: {names}. "
            "Models load in __init__ or configure_model; of several, freeze all but the one you mean, as by "
            "teacher.requires_grad_(False), or prune that one with prune_model."
        )
    return model


def _that_holds_all(held: Mapping[nn.Module, set[nn.Parameter]]) -> nn.Module | None:
    """Find the model that holds the parameters of all; of several forms the outermost, which comes first."""
    model = max(held, key=lambda model: (len(held[model]), len(list(model.modules()))), default=None)
    return model if model is not None and all(own <= held[model] for own in held.values()) else None


def is_language_model(model: nn.Module) -> bool:
    """Whether a model is called with token ids alone, and its tokens see those before them: a decoder of transformers.

    Args:
        model: Any module.

    Returns:
        False for encoders, encoder-decoders, models of other inputs, and modules that are not of transformers. A model
        that sees images, too, and writes text is one.
    """
    plain: Any = uncompiled(model)
    if not is_of_transformers(plain) or getattr(plain, "main_input_name", "input_ids") != "input_ids":
        return False
    try:
        embeddings = plain.get_input_embeddings()
    except NotImplementedError:  # of transformers' own method, for models with several
        return False
    if getattr(plain.config, "is_encoder_decoder", False) or getattr(embeddings, "weight", None) is None:
        return False
    if any(getattr(module, "is_causal", None) is True for module in plain.modules()):
        return True
    generates = getattr(plain, "can_generate", None)
    if generates is not None and generates():
        return True
    # Some attention modules do not say, such as those of MPT and of DeBERTa: then the kind of model does.
    from transformers.models.auto import modeling_auto

    kind = getattr(plain.config, "model_type", None)
    writes, fills = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return kind in writes and kind not in fills


def find_model(module: nn.Module) -> nn.Module:
    """Find what is to be pruned, evaluated and saved in any module, such as a LightningModule.

    Args:
        module: The module.

    Returns:
        The model of transformers that it holds; where there is none, the only child that has weights; else itself.

    Raises:
        ValueError: If there are several models of transformers side by side.
    """
    if any(is_of_transformers(child) for child in module.modules()):
        return find_language_model(module)
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    own = any(True for _ in module.parameters(recurse=False))
    return uncompiled(children[0]) if len(children) == 1 and not own else module


def max_sequence_length(config: Any) -> int | None:
    """Return the longest sequence a model's positions allow, or None where its config does not say."""
    longest = getattr(_of_text(config), "max_position_embeddings", None)
    return longest if longest and longest > 0 else None  # XLNet says -1


def vocabulary_size(config: Any) -> int | None:
    """Return how many tokens a model knows, or None where its config does not say."""
    return getattr(_of_text(config), "vocab_size", None)


def _of_text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the original of what ``torch.compile`` or ``Fabric.setup`` returned, any other module as it is.

    Raises:
        ValueError: If it is no module but, for example, the name of one.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, such as one of from_pretrained, got {model!r:.60}")
    original = model._modules.get("_orig_mod", model._modules.get("_original_module"))
    return model if original is None else original


def is_of_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    return hasattr(module, "config") and hasattr(module, "get_input_embeddings")
