"""Perplexity of a causal language model, exact in every dtype.

Shapes: B batch, T tokens, V vocabulary, N tokens of a chunk.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

CHUNK = 128  # tokens upcast at a time: no second copy of the logits


class Perplexity(Metric):
    """exp of the mean cross-entropy of the next token, over all tokens of all batches and processes.

    Cross-entropy is computed in float32 whatever the logits' dtype, and summed in float64.

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

    @torch.no_grad()
    @override
    def update(self, logits_BTV: Tensor, labels_BT: Tensor) -> None:
        """Add a batch.

        Args:
            logits_BTV: Predictions, shape (B, T, V); those at t are for the label at t + 1, as in transformers.
            labels_BT: Token ids, shape (B, T); -100 is not counted.
        """
        labels_BT = labels_BT[:, 1:]
        for logits_TV, labels_T in zip(logits_BTV[:, :-1], labels_BT, strict=True):  # flattened they would be copied
            for logits, labels in zip(logits_TV.split(CHUNK), labels_T.split(CHUNK), strict=True):
                self.nll += F.cross_entropy(logits.float(), labels, reduction="sum").double()
        self.tokens += (labels_BT != -100).sum()

    @override
    def compute(self) -> Tensor:
        """Return the perplexity, float64."""
        return torch.exp(self.nll / self.tokens)
