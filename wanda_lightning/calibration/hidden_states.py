"""Where the calibration activations wait: between two decoder layers, or before a linear.

Shapes: B batch, T tokens, D hidden size.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Place = Literal["device", "cpu", "disk"]


def check_activations(activations: str) -> None:
    """Refuse a place that there is not.

    Args:
        activations: What users say.

    Raises:
        ValueError: If it is no :data:`Place`.
    """
    if activations not in get_args(Place):
        raise ValueError(f"activations must be one of {', '.join(get_args(Place))}, got {activations!r}")


class _Folder:
    """A temporary folder that lives as long as somebody holds it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="wanda_lightning-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class HiddenStates:
    """The hidden states that enter a layer, a tensor (B, T, D) a batch.

    Args:
        place: ``"device"`` leaves them where they were computed; ``"cpu"`` keeps them in RAM, and ``"disk"`` in
            temporary files (in ``TMPDIR``), from where they come back a batch at a time.

    Raises:
        ValueError: If the place is none of these.
    """

    def __init__(self, place: Place = "device") -> None:
        check_activations(place)
        self.place = place
        self._kept: list[tuple[Tensor | Path, torch.device]] = []
        self.shapes: list[Tensor] = []  # of the batches, on the meta device
        self._folder = _Folder() if place == "disk" else None

    def append(self, hidden_BTD: Tensor) -> None:
        """Add a batch."""
        self._kept.append((torch.empty(0), hidden_BTD.device))
        self.shapes.append(torch.empty(0))
        self[len(self._kept) - 1] = hidden_BTD

    def replace(self, others: "HiddenStates") -> None:
        """Let go of these, and hold what others hold."""
        self._kept, self._folder, self.shapes = others._kept, others._folder, others.shapes

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def __getitem__(self, batch: int) -> Tensor:
        kept, device = self._kept[batch]
        if isinstance(kept, Tensor):
            return kept.to(device)
        return torch.load(kept, weights_only=True).to(device, copy=True)  # the storage of what is loaded cannot shrink

    def __setitem__(self, batch: int, hidden_BTD: Tensor) -> None:
        self._kept[batch] = self._put(hidden_BTD, str(batch)), hidden_BTD.device
        self.shapes[batch] = torch.empty_like(hidden_BTD, device="meta")

    def _put(self, values: Tensor, name: str) -> Tensor | Path:
        """Move values to where they wait, if that is on disk to a file of a name."""
        if self._folder is None:
            return values.cpu() if self.place == "cpu" else values
        file = self._folder.path / f"{name}.pt"
        try:
            with file.open("wb") as out:
                torch.save(values.cpu(), out)
        except (OSError, RuntimeError) as error:  # torch's own comes after that of the file, and says nothing of it
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(
                f"activations cannot wait in {file.parent}: {reason}. Make room, or let TMPDIR name another folder"
            ) from error
        return file

    def set_aside(self, tensor: Tensor, name: str) -> Callable[[], None]:
        """Move the values of a tensor to where these are, though others hold the tensor; it is empty meanwhile.

        Args:
            tensor: Not to be used before it is filled again.
            name: Of a file, different for all that are aside at a time.

        Returns:
            What fills it again.
        """
        # It may be there already, and torch cannot free storages of Apple's GPUs.
        stays = self.place == "device" or tensor.device.type in (self.place, "mps")
        if stays or not (storage := tensor.untyped_storage()).resizable():
            return lambda: None
        size = storage.nbytes()
        values = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        kept = self._put(values, name)
        storage.resize_(0)

        def fill(_: _Folder | None = self._folder) -> None:  # which is there as long as this is
            storage.resize_(size)
            values.copy_(torch.load(kept, weights_only=True) if isinstance(kept, Path) else kept)

        return fill
