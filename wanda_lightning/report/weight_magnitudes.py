"""How large the weights were that a pruning kept, and those that it removed: counts in bins that are even in log |w|.

Shapes: O out features, I in features.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

SAMPLE = 2**14
"""In a larger matrix, evenly spaced rows with about this many weights are counted; so few need no second thread."""

ZERO = -127
"""The bin of weights that are zero, or below 2**-31."""


@dataclass
class Magnitudes:
    """Counts of weights by |w| before the pruning, four bins an octave: bin b holds 2**(b/4) <= |w| < 2**((b + 1)/4).

    Attributes:
        kept: How many weights of each bin were kept; bins with none are left out.
        pruned: How many were removed.
    """

    kept: dict[int, int] = field(default_factory=dict)
    pruned: dict[int, int] = field(default_factory=dict)

    def count(self, dense_OI: Tensor, mask_OI: Tensor) -> None:
        """Add the weights of a matrix.

        Args:
            dense_OI: The weights before they were pruned, shape (out_features, in_features).
            mask_OI: Which of them were kept (True), the same shape.
        """
        step = max(1, dense_OI.numel() // SAMPLE)
        kept_OI = mask_OI[::step]
        # The exponent of w^4 as a float32 is 127 above the bin: a quarter of the price of a logarithm.
        bins_OI = dense_OI[::step].float().square().square_().view(torch.int32) >> 23
        both = torch.bincount(bins_OI.mul_(2).add_(kept_OI).flatten(), minlength=512).view(256, 2).t().tolist()
        pruned, kept = ({b: count for b, count in enumerate(counts, ZERO) if count} for counts in both)
        self.add(Magnitudes(kept, pruned))

    def add(self, other: "Magnitudes") -> None:
        """Add the counts of other weights."""
        for counts, more in ((self.kept, other.kept), (self.pruned, other.pruned)):
            for b, count in more.items():
                counts[b] = counts.get(b, 0) + count

    @classmethod
    def from_dict(cls, plain: dict[str, dict[str, int]]) -> "Magnitudes":
        """Read back what JSON made of the counts: its keys are text."""
        return cls(*({int(b): count for b, count in plain[name].items()} for name in ("kept", "pruned")))
