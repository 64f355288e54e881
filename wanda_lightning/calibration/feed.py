"""How a calibration batch goes through a model: with its token ids alone, or in the way that its owner calls it."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import model_inputs, tensors_in
from wanda_lightning.calibration.calls import rebuilt
from wanda_lightning.calibration.real_tokens import RealTokens, real_tokens
from wanda_lightning.model.attention import every_linear_is_called
from wanda_lightning.model.offload import device_of
from wanda_lightning.model.replaced import replaced

log = logging.getLogger(__name__)

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch; what it returns is not used."""

FEW = 32
"""So few tokens show whether a model overflows whose numbers have the range of float32: it is its weights then."""

SENSES = ("pixel_values", "input_features")
"""How the names of what transformers' models see and hear begin."""


class Feed:
    """Feeds batches of any kind to any module.

    Args:
        model: The module.
        forward: Runs it on a batch. Default: mappings are its keyword arguments, a tensor its only argument, and of a
            tuple or list the first element is, with labels or so behind it.
    """

    may_hand_on = True
    """Whether what the model passes to a layer is taken to depend on what others gave; else that is looked at."""

    head: nn.Module | None = None
    """What the model calls behind its layers, where that is known."""

    def __init__(self, model: nn.Module, forward: Forward | None = None) -> None:
        self.model, self._forward = model, forward or call_with
        self.device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def run(self, batch: Any) -> None:
        """Run the model on a batch."""
        self._forward(self.model, _moved(batch, self.device))

    def tensors(self, batch: Any) -> dict[str, Tensor]:
        """Return what is in a batch, by name.

        Args:
            batch: Tensors, in mappings, tuples, lists and dataclasses.

        Returns:
            The tensors.

        Raises:
            ValueError: If there are none, or all are empty.
        """
        found = dict(tensors_in(batch))
        if not any(tensor.numel() for tensor in found.values()):
            raise ValueError(
                "a calibration batch must hold tensors that are not empty, in mappings, tuples, lists or dataclasses; "
                f"got {batch!r:.200}"
            )
        return found

    def real_tokens(self, batch: Any, hidden: Tensor, arguments: Mapping[str, Any]) -> RealTokens:
        """Find out which tokens are no padding.

        Args:
            batch: The batch.
            hidden: What of it enters a layer; only the shape counts.
            arguments: What else the layer is given, by the names of its parameters.

        Returns:
            What the masks in the batch say of them.
        """
        masks = _masks(batch)
        if masks and _takes_tokens_first(self.model):  # else a square mask would be taken for one of (B, T)
            masks = {name: mask.t() for name, mask in masks.items()}
        return real_tokens(masks, hidden, arguments)

    def first(self, batch: Any) -> Any:
        """Return a small part of a batch, where that can be taken."""
        return batch

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Keep the model from what would make two calls differ: caches of keys, and fast paths around its linears."""
        configs = {id(c): c for m in self.model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")}
        with ExitStack() as stack:
            for config in configs.values():
                stack.enter_context(replaced(config, "use_cache", False))
            stack.enter_context(every_linear_is_called(self.model))
            yield


class LanguageModelFeed(Feed):
    """Feeds token ids to a language model of transformers."""

    may_hand_on = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._has_said_so = False
        self.device = device_of(cast(Any, model).get_input_embeddings())
        self.head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def run(self, batch: Any) -> None:
        """Run the model on a batch of token ids."""
        self.model(**{n: x.to(self.device) for n, x in self.tensors(batch).items()}, use_cache=False)

    def tensors(self, batch: Any) -> dict[str, Tensor]:
        """Return ``input_ids`` and what goes with them, checked; see :func:`model_inputs`."""
        unread = [name for name in batch if str(name).startswith(SENSES)] if isinstance(batch, Mapping) else []
        if unread and not self._has_said_so:
            self._has_said_so = True
            log.warning(
                "the model is calibrated on token ids alone, and not on %s: tokens that stand for them are taken for "
                "text. To calibrate on all, say how the model is called: with forward, or a calibration_step",
                ", ".join(unread),
            )
        return model_inputs(batch, self.model)

    def real_tokens(self, batch: Any, hidden: Tensor, arguments: Mapping[str, Any]) -> RealTokens:
        """Read the mask of a batch, if it has one; it is of the token ids."""
        mask_BT = self.tensors(batch).get("attention_mask")
        return RealTokens(None if mask_BT is None or bool(mask_BT.all()) else mask_BT.bool())

    def first(self, batch: Any) -> Any:
        """Return the first sequence of a batch; where neither float16 nor padding asks for more, its first tokens."""
        inputs, device = self.tensors(batch), self.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        half = autocast or cast(Any, self.model).dtype == torch.float16
        tokens = None if half or len(inputs) > 1 else FEW
        return {name: tensor[:1, :tokens] for name, tensor in inputs.items()}

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Nothing is to be kept from such a model: its cache is switched off for every call."""
        yield


def _takes_tokens_first(model: nn.Module) -> bool:
    """Whether the hidden states of torch's own layers in a model are (T, B, D)."""
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return any(isinstance(module, kinds) and not module.self_attn.batch_first for module in model.modules())


def _masks(batch: Any) -> dict[str, Tensor]:
    """Return the padding masks in a batch by name, booleans, True = real; in torch's own, True is padding."""
    masks = {}
    for path, tensor in tensors_in(batch):
        name = path.rpartition(".")[2]
        if tensor.dim() == 2 and name in ("attention_mask", "encoder_attention_mask", "decoder_attention_mask"):
            masks[name] = tensor != 0
        elif tensor.dim() == 2 and name.endswith("padding_mask") and tensor.dtype == torch.bool:
            masks[name] = ~tensor
    return masks


def call_with(model: nn.Module, batch: Any) -> Any:
    """Call a module with a batch: a mapping's values by name, a tensor, or the first element of a tuple or list.

    Args:
        model: The module.
        batch: The batch.

    Returns:
        What the module gives.

    Raises:
        ValueError: If it cannot be called so.
    """
    named = batch if isinstance(batch, Mapping) else {}
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    arguments = [] if isinstance(batch, Mapping) else [first]
    advice = "say how with forward, or a calibration_step; or prune the model that it holds, such as module.model"
    try:
        signature(model.forward).bind(*arguments, **named)
    except TypeError as error:
        raise ValueError(f"{type(model).__name__} cannot be called with a batch alone ({error}): {advice}") from error
    try:
        return model(*arguments, **named)
    except NotImplementedError as error:
        if "forward" not in str(error):  # which says that there is none
            raise
        raise ValueError(f"{type(model).__name__} has no forward to be called with a batch: {advice}") from error


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):  # a tensor, or what a tokenizer or an image processor gives
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return rebuilt(batch, [_moved(value, device) for value in batch])
    return batch
