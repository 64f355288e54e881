"""What a pruning has finished so far, layer by layer on disk, so that a crash costs at most the layer it was at.

A folder with ``run.json``, which says what run it is, and a safetensors file for each finished layer: its pruned
weights (the masks are where they are not zero) and the rows of its report.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanda_lightning.fingerprint import differences, hashed
from wanda_lightning.report import LinearReport, write_text

log = logging.getLogger(__name__)


class Journal:
    """The finished layers of one pruning; only one process at a time may write to it.

    Args:
        folder: Where it is kept; made if needed.

    Raises:
        ValueError: If another process is writing there. The lock goes with its process, however that ends.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "lock", is_singleton=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run is writing to {self.folder.parent}: wait for it, or choose another folder"
            ) from None

    def start(self, fingerprint: Mapping[str, Any]) -> int:
        """Begin a run, or go on with it.

        Args:
            fingerprint: What decides its results, by name; plain types.

        Returns:
            How many layers are finished, as far as can be told without reading them.

        Raises:
            ValueError: If the folder holds another run; it says where they differ.
        """
        file = self.folder / "run.json"
        fingerprint = json.loads(json.dumps(dict(fingerprint)))  # as it will be read back
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if other := differences(found, fingerprint):
                raise ValueError(
                    f"{self.folder} holds the unfinished layers of another run ({'; '.join(other)}): finish that one, "
                    "delete the folder, or choose another"
                )
        else:
            write_text(file, json.dumps(fingerprint, indent=2) + "\n")
        finished = 0
        while self.file(finished).exists():
            finished += 1
        return finished

    def file(self, layer: int) -> Path:
        """Name the file of a layer."""
        return self.folder / f"layer-{layer:05d}.safetensors"

    def save(self, layer: int, weights: Mapping[str, Tensor], rows: list[LinearReport]) -> None:
        """Make a layer durable: to a temporary name, to the disk, renamed.

        Raises:
            OSError: If it cannot be written; the layers before it are kept.
        """
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        metadata = {"rows": json.dumps([asdict(row) for row in rows]), "sha256": hashed(tensors)}
        unfinished = self.folder / ".unfinished"
        try:
            save_file(tensors, unfinished, metadata=metadata)
            _to_disk(unfinished)
            os.replace(unfinished, self.file(layer))
            _to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"layer {layer} cannot be written to {self.folder}: {error}. The {layer} layers before it are kept "
                "there: make room, and the same run goes on behind them"
            ) from error

    def load(self, layer: int) -> tuple[dict[str, Tensor], list[LinearReport]] | None:
        """Read a finished layer; None if there is none, or its file is damaged: it and later ones are dropped then."""
        file = self.file(layer)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
                metadata = stored.metadata() or {}
            if hashed(tensors) == metadata["sha256"]:
                rows = [LinearReport(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(metadata["rows"])]
                return tensors, rows
        except (SafetensorError, OSError, KeyError, ValueError):
            pass
        log.warning("%s is damaged: this layer and those after it are pruned again", file)
        while self.file(layer).exists():
            self.file(layer).unlink()
            layer += 1
        return None

    def remove(self) -> None:
        """Delete it all: the model is saved, or nothing was begun."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.release(force=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
