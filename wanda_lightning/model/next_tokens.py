"""Which tokens of a batch a language model is asked to predict. Shapes: B batch, T tokens."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

NOT_PREDICTED = -100
"""The label of a token that does not count, in torch's cross-entropy and in transformers."""


def inputs_and_labels(batch: Mapping[str, Tensor] | Tensor | Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Tell what a model is called with from what it is to predict.

    Padding is not predicted, and nothing is predicted from padding or from another sequence: the first token of a
    sequence does not count, on whichever side it is padded, or where in a row of several it begins.

    Args:
        batch: ``input_ids`` and, where given, ``attention_mask``, ``position_ids`` and ``labels``, each (B, T), and
            other inputs; or ``input_ids`` alone, also in a list of one, as a ``TensorDataset`` has it.

    Returns:
        The batch without labels; and labels, its own or its ``input_ids``, shape (B, T), each to be predicted at the
        token before it, as transformers has them; -100 = not to be counted.

    Raises:
        ValueError: If the batch is something else, or its mask of another shape.
    """
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch must be a mapping that holds input_ids, or these alone, got {repr(batch)[:200]}")
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels_BT = batch["labels"] if batch.get("labels") is not None else batch["input_ids"]
    positions = batch.get("position_ids")
    if positions is not None and positions.shape == labels_BT.shape:  # those of images have three dimensions
        labels_BT = labels_BT.masked_fill(positions == 0, NOT_PREDICTED)
    mask_BT = batch.get("attention_mask")
    if mask_BT is None:
        return inputs, labels_BT
    if mask_BT.shape != labels_BT.shape:  # as of (B, 1, T, T), which does not tell what is padding
        raise ValueError(
            f"attention_mask must have the shape of the labels, or of input_ids, {tuple(labels_BT.shape)}, 0 where "
            f"there is padding, got {tuple(mask_BT.shape)}; position_ids tell sequences in one row apart"
        )
    real_BT = mask_BT != 0
    follows_real_BT = F.pad(real_BT[:, :-1], (1, 0), value=True)
    return inputs, labels_BT.masked_fill(~(real_BT & follows_real_BT), NOT_PREDICTED)
