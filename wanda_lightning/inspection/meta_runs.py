"""What a model shows where it runs on the meta device: nothing is computed, so that its size and its tokens are free.

Shapes: B batch, T tokens.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import nn

from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.held import held_before
from wanda_lightning.model.hooks import before_calls

log = logging.getLogger(__name__)


def run_on_meta(model: Any, tokens: int) -> None:
    """Run a model on one window, as far as it gets; some models look at values, which meta tensors do not have.

    Args:
        model: The model, on the meta device.
        tokens: Length of the window.
    """
    try:
        with torch.no_grad():
            ids_BT = torch.zeros(1, tokens, dtype=torch.long, device="meta")
            # A mask that is ready-made spares the model a look at values.
            mask_B1TT = torch.zeros(1, 1, tokens, tokens, dtype=model.dtype, device="meta")
            model(input_ids=ids_BT, attention_mask=mask_B1TT, use_cache=False)
    except Exception as error:
        log.info("%s does not run to its end on the meta device: %s", type(model).__name__, error)


def calls_a_layer(model: Any, layers: Sequence[DecoderLayer]) -> float:
    """Count how often a model calls each of its layers, on the mean: HRM-Text goes through them several times.

    Args:
        model: The model, on the meta device.
        layers: Its layers.

    Returns:
        At least 1, also where the model does not run to its end.
    """
    calls: list[nn.Module] = []
    with before_calls([layer.module for layer in layers], lambda module, *_: calls.append(module)):
        run_on_meta(model, 8)
    return max(1.0, len(calls) / len(layers))


def numbers_waiting(model: Any, layer: DecoderLayer, tokens: int) -> float:
    """Count what a layer makes and still holds where it calls one of its linears, at most.

    Args:
        model: The model, on the meta device.
        layer: Its first layer.
        tokens: Length of a window.

    Returns:
        Numbers a token; 0 where the model does not run so far.
    """
    most = [0]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        def run() -> None:
            with suppress(Exception):  # what was seen until then counts
                module.forward(*args, **kwargs)

        held = held_before({linear.module for linear in layer.linears}, run)
        most.extend(each.nbytes for each in held.values())
        raise EOFError("enough was seen")

    with before_calls([layer.module], enter):
        run_on_meta(model, tokens)
    return max(most) / model.dtype.itemsize / tokens
