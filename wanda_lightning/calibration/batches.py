"""Batches of a calibration set, as a model takes them. Shapes: B batch, T tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanda_lightning.model.language_model import max_sequence_length

READ = ("input_ids", "attention_mask", "position_ids")
"""What a language model is given of a batch. Positions that begin anew part texts that are packed in one row."""

IDS = (torch.int64, torch.int32)
"""The data types of token ids that embeddings take."""

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


def model_inputs(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """Read a calibration batch and check that the model can take it.

    Args:
        batch: See :func:`walk`.
        model: The causal language model.

    Returns:
        ``input_ids`` and, where given, ``attention_mask`` and ``position_ids``, each (B, T).

    Raises:
        ValueError: If there are no input_ids, or their type, shape, length or values are not the model's.
    """
    inputs = tensors_of(batch)
    ids_BT = inputs["input_ids"]
    mask_BT = inputs.get("attention_mask")
    if mask_BT is not None and mask_BT.shape != ids_BT.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(ids_BT.shape)}, got {tuple(mask_BT.shape)}"
        )
    limit = max_sequence_length(model.config)
    if limit is not None and ids_BT.shape[1] > limit:
        raise ValueError(f"a calibration sequence has {ids_BT.shape[1]} tokens, the model takes at most {limit}")
    vocabulary = cast(Any, model).get_input_embeddings().weight.shape[0]
    if int(ids_BT.min()) < 0 or int(ids_BT.max()) >= vocabulary:
        raise ValueError(
            f"input_ids must lie in [0, {vocabulary}), the model's vocabulary, "
            f"got {int(ids_BT.min())} to {int(ids_BT.max())}: is this the model's tokenizer?"
        )
    return inputs


def count(batch: Any) -> tuple[int, int]:
    """Return the number of samples in a calibration batch, and of tokens that are no padding.

    Args:
        batch: The batch, of any kind.

    Returns:
        The two numbers. Where there are no input_ids, the first is the length of the first tensor, and the second 0.
    """
    try:
        inputs = tensors_of(batch)
    except ValueError:
        first = next((tensor for _, tensor in tensors_in(batch) if tensor.dim()), None)
        return 0 if first is None else len(first), 0
    ids_BT = inputs["input_ids"]
    mask_BT = inputs.get("attention_mask")
    return len(ids_BT), ids_BT.numel() if mask_BT is None else int((mask_BT != 0).sum())


def tensors_in(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch, with names such as ``"labels"`` or ``"0"`` that tell where they are."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(batch, tuple | list):
        for index, value in enumerate(batch):
            yield from tensors_in(value, f"{name}.{index}" if name else str(index))
    elif is_dataclass(batch):
        yield from tensors_in({each.name: getattr(batch, each.name) for each in fields(batch)}, name)


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Find what a language model reads of a batch; whatever else is in it, such as labels, is left alone."""
    inputs: dict[str, Any]
    if isinstance(batch, Mapping):
        inputs = {name: batch[name] for name in READ if batch.get(name) is not None}
    else:
        inputs = {"input_ids": batch[0] if isinstance(batch, tuple | list) and batch else batch}
    ids_BT = inputs.get("input_ids")
    if not isinstance(ids_BT, Tensor) or ids_BT.dim() != 2 or ids_BT.dtype not in IDS or ids_BT.numel() == 0:
        given = (
            f"a {ids_BT.dtype} tensor of shape {tuple(ids_BT.shape)}" if isinstance(ids_BT, Tensor) else repr(ids_BT)
        )
        keys = f" under the keys {sorted(batch)}" if isinstance(batch, Mapping) else ""
        raise ValueError(
            f"a calibration batch must hold input_ids, int64 or int32 of shape (B, T), got {given[:200]}{keys}"
        )
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} of a calibration batch must be a tensor, as input_ids are, got {tensor!r:.200}")
    if "position_ids" in inputs and inputs["position_ids"].shape != ids_BT.shape:  # of images, in three dimensions
        del inputs["position_ids"]
    return inputs


def held_out_batches(batches: int, share: float, purpose: str) -> range:
    """Say which calibration batches only tell how well the others serve: for a share of 1/8 every eighth.

    Args:
        batches: How many there are.
        share: The share of those that are held out, in (0, 0.5]; one at least is.
        purpose: What they are held out for.

    Returns:
        Their numbers.

    Raises:
        ValueError: If there are too few.
    """
    if batches < 2:
        raise ValueError(f"{purpose} needs at least 2 calibration batches, one of them held out, got {batches}")
    every = min(round(1 / share), batches)
    return range(every - 1, batches, every)
