"""By which class of transformers a model is loaded, if it is a causal language model."""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def auto_class(config: "PreTrainedConfig") -> Any:
    """Choose the class of transformers that loads all of a model, also what sees images or hears, if there is such.

    Args:
        config: Config of a causal language model.

    Returns:
        ``AutoModelForCausalLM`` or ``AutoModelForMultimodalLM``.

    Raises:
        ValueError: If it is the config of another kind of model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    mappings = {
        AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForMultimodalLM: modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }
    models = {auto: mapping[type(config)] for auto, mapping in mappings.items() if type(config) in mapping}
    families = [auto for auto, model in models.items() if _takes_text_alone(config, model)]
    saved_as = [auto for auto in families if models[auto].__name__ in (config.architectures or [])]
    remote = [AutoModelForCausalLM] if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) else []
    if choice := [*remote, *saved_as, *families]:
        return choice[0]
    raise ValueError(
        f"a model of type {config.model_type!r} is no causal language model of transformers that takes text alone: "
        "prune it from Python, with batches of what it takes"
    )


def _takes_text_alone(config: "PreTrainedConfig", model: "type[PreTrainedModel]") -> bool:
    """Whether a model can be called with token ids only.

    Of an encoder-decoder, such as BART, transformers would load the decoder alone; others do not go without an image
    (BLIP-2), or cannot be called as a whole (Qwen's Omni).
    """
    is_called = model.forward is not nn.Module.forward
    return is_called and model.main_input_name == "input_ids" and not getattr(config, "is_encoder_decoder", False)
