"""Perplexity of a causal language model, exact in every dtype.

Shapes: B batch, T tokens, V vocabulary, D hidden size.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from wanda_lightning.precision import longest_float

log = logging.getLogger(__name__)

CHUNK = 128  # tokens whose logits are made, or upcast, at a time


class Perplexity(Metric):
    """exp of the mean cross-entropy of the next token, over all tokens of all batches and processes.

    Cross-entropy is computed in float32 whatever the logits' dtype, and summed in float64; on the CPU where the device
    has no float64.

    Examples:
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))
        >>> round(metric.compute().item(), 4)
        8.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")
        self.head_ends_model = True  # until a model shows otherwise

    @torch.no_grad()
    @override
    def update(self, logits_BTV: Tensor, labels_BT: Tensor, head: nn.Module | None = None) -> None:
        """Add a batch.

        Args:
            logits_BTV: Predictions, shape (B, T, V); those at t are for the label at t + 1, as in transformers. With a
                head they are hidden states, shape (B, T, D).
            labels_BT: Token ids, shape (B, T); -100 is not counted.
            head: What makes logits of hidden states.
        """
        labels_BT = labels_BT[:, 1:]
        for given_TV, labels_T in zip(logits_BTV[:, :-1], labels_BT, strict=True):  # flattened they would be copied
            for given, labels in zip(given_TV.split(CHUNK), labels_T.split(CHUNK), strict=True):
                logits = given if head is None else head(given[None])[0].to(labels.device)
                nll = F.cross_entropy(logits.float(), labels, reduction="sum")
                self.nll += nll.to(self.nll.device)
        self.tokens += (labels_BT != -100).sum()

    @torch.no_grad()
    def update_from(self, model: Any, inputs: dict[str, Tensor], labels_BT: Tensor) -> None:
        """Add a batch without ever holding the logits of all its tokens.

        The head, ``get_output_embeddings()``, sees the last token of each sequence only while the model runs, and the
        others a chunk at a time afterwards. That the model returns what the head gave is seen from the last tokens;
        where it does more, such as capping logits, or hides its head, logits are made all at once.

        Args:
            model: A causal language model of transformers.
            inputs: What it is called with, such as input_ids, shape (B, T).
            labels_BT: See :meth:`update`.
        """
        head = model.get_output_embeddings() if self.head_ends_model else None
        self.head_ends_model = head is not None and not _is_sharded(head)
        if head is None or not self.head_ends_model:
            self.update(model(**inputs, use_cache=False).logits, labels_BT)
            return
        hidden: list[Tensor] = []

        def keep_last(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden.extend(args[:1])
            return (*(each[:, -1:] for each in args[:1]), *args[1:])

        with head.register_forward_pre_hook(keep_last):
            last_B1V = model(**inputs, use_cache=False).logits
        self.head_ends_model = (
            len(hidden) == 1
            and hidden[0].shape[:2] == labels_BT.shape
            and torch.equal(last_B1V, head(hidden[0][:, -1:]).to(last_B1V.device))
        )
        if self.head_ends_model:
            self.update(hidden[0], labels_BT, head)
        else:
            self.update_from(model, inputs, labels_BT)

    @override
    def compute(self) -> Tensor:
        """Return the perplexity, float64 where the device has that; NaN, with a warning, if nothing was predicted."""
        if not self.tokens:
            log.warning("perplexity is NaN: no token was predicted, as where all labels are -100")
        device = self.tokens.device
        return torch.exp(self.nll / self.tokens.to(self.nll.device)).to(longest_float(device)).to(device)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> nn.Module:
        """Move to where ``fn`` moves; sums keep their dtype, for Trainers convert whole modules to half precision."""
        device = fn(torch.zeros(1, device=self.device)).device
        has_float64 = longest_float(device) == torch.float64
        return super()._apply(lambda state: state.to(device), exclude_state if has_float64 else [*exclude_state, "nll"])


def _is_sharded(head: nn.Module) -> bool:
    """Whether the processes share a head's weight, so that they have to call it equally often."""
    return hasattr(getattr(head, "weight", None), "full_tensor")
