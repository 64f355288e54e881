"""Models whose linears hold quantised weights."""

from torch import nn

from wanda_lightning.model.linears import is_linear, own_modules

PACKED = ("qweight", "weight_packed", "W_q", "_packed_params")
"""Where GPTQ and AWQ, compressed-tensors, HQQ, and torch itself keep the weights of what was a linear."""


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model that transformers or another library has quantised.

    Args:
        model: The model.

    Raises:
        ValueError: If a linear is quantised, with its name.
    """
    by_transformers = getattr(model, "hf_quantizer", None) is not None
    for name, module in own_modules(model):
        if any(hasattr(module, part) for part in PACKED) or (by_transformers and is_linear(module)):
            raise ValueError(f"{name} is quantised, and pruning needs plain weights: prune before quantising")
