"""Where the calibration activations wait between two decoder layers.

Shapes: B batch, T tokens, D hidden size.
"""

import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Place = Literal["device", "cpu", "disk"]


class HiddenStates:
    """The hidden states that enter a layer, a tensor (B, T, D) a batch.

    Args:
        place: ``"device"`` leaves them where they were computed; ``"cpu"`` keeps them in RAM, and ``"disk"`` in
            temporary files (in ``TMPDIR``), from where they come back a batch at a time.

    Raises:
        ValueError: If the place is none of these.
    """

    def __init__(self, place: Place = "device") -> None:
        if place not in get_args(Place):
            raise ValueError(f"activations must be one of {', '.join(get_args(Place))}, got {place!r}")
        self.place = place
        self._kept: list[tuple[Tensor | Path, torch.device]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="wanda_lightning-") if place == "disk" else None
        if self._folder is not None:
            weakref.finalize(self, self._folder.cleanup)

    def append(self, hidden_BTD: Tensor) -> None:
        """Add a batch."""
        self._kept.append((torch.empty(0), hidden_BTD.device))
        self[len(self._kept) - 1] = hidden_BTD

    def replace(self, others: "HiddenStates") -> None:
        """Let go of these, and hold what others hold."""
        self._kept, self._folder = others._kept, others._folder

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def __getitem__(self, batch: int) -> Tensor:
        kept, device = self._kept[batch]
        return (kept if isinstance(kept, Tensor) else torch.load(kept, weights_only=True)).to(device)

    def __setitem__(self, batch: int, hidden_BTD: Tensor) -> None:
        kept: Tensor | Path = hidden_BTD
        if self._folder is not None:
            kept = Path(self._folder.name) / f"{batch}.pt"
            torch.save(hidden_BTD.cpu(), kept)
        elif self.place == "cpu":
            kept = hidden_BTD.cpu()
        self._kept[batch] = kept, hidden_BTD.device
