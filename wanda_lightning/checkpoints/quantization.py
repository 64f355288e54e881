"""Quantised checkpoints: what transformers can de-quantise is loaded as plain weights, the rest is refused at once."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def dense_settings(config: "PreTrainedConfig", pretrained: str, quantization: Any = None) -> dict[str, Any]:
    """Choose the arguments of ``from_pretrained`` with which a checkpoint loads as plain weights.

    Args:
        config: Config of the checkpoint.
        pretrained: Its name, for the error.
        quantization: What the user gives as ``quantization_config``.

    Returns:
        Arguments; none for a checkpoint that is not quantised.

    Raises:
        ValueError: If its weights would stay quantised.
    """
    from transformers import FineGrainedFP8Config, Mxfp4Config

    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    method = _method(stored or quantization)
    if stored and method in ("fp8", "mxfp8"):
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    if stored and method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if method:
        raise ValueError(
            f"{pretrained} {'is' if stored else 'would be'} quantised ({method}), and pruning needs plain weights: "
            "prune before quantising (of quantised files, those in fp8 and mxfp4 are de-quantised)"
        )
    return {}


def forget_quantization(model: "PreTrainedModel") -> None:
    """Let ``save_pretrained`` write de-quantised weights as what they are, not under the names of quantised ones."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    operations = [operation for each in conversions for operation in getattr(each, "operations", ())]
    if any(getattr(operation, "hf_quantizer", None) is not None for operation in operations):
        del model._weight_conversions  # then it goes by the class of the model


def _method(quantization: Any) -> str | None:
    """Return the name of a way to quantise, as ``quant_method`` has it."""
    if not quantization:
        return None
    fields = quantization if isinstance(quantization, dict) else vars(quantization)
    method = fields.get("quant_method", "bitsandbytes" if "load_in_4bit" in fields or "load_in_8bit" in fields else "?")
    return str(getattr(method, "value", method))
