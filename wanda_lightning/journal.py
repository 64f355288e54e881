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

from wanda_lightning.decoder import DecoderLayer
from wanda_lightning.fingerprint import differences, hashed
from wanda_lightning.processes import Processes
from wanda_lightning.report import LinearReport, write_text

log = logging.getLogger(__name__)


class Journal:
    """The finished layers of one pruning; only one run at a time may write to them.

    Args:
        folder: Where they are kept; made when the pruning starts.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = FileLock(self.folder / "lock", is_singleton=True)

    def start(self, fingerprint: Mapping[str, Any]) -> None:
        """Begin a run, or go on with it.

        Args:
            fingerprint: What decides its results, by name; plain types.

        Raises:
            ValueError: If the folder holds another run (it says where they differ), or another process is writing
                there: the lock goes with its process, however that ends.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run is writing to {self.folder.parent}: wait for it, or choose another folder"
            ) from None
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
        if finished := len([*self.folder.glob("layer-*.safetensors")]):
            log.info("%d layers are finished in %s: the run goes on behind them", finished, self.folder)

    def file(self, layer: int) -> Path:
        """Name the file of a layer."""
        return self.folder / f"layer-{layer:05d}.safetensors"

    def record(self, number: int, layer: DecoderLayer, rows: list[LinearReport], processes: Processes) -> None:
        """Make a pruned layer durable; no process goes on before it is.

        Raises:
            OSError: If it cannot be written; the layers before it are kept.
        """
        with processes.together():
            if processes.rank == 0:
                self._save(number, layer.weights, rows)

    def restore(self, number: int, layer: DecoderLayer, processes: Processes) -> list[LinearReport] | None:
        """Put a layer in the state in which it was recorded; return its rows, or None if it was not."""
        found = self._load(number) if processes.rank == 0 else None
        rows = processes.gather(found[1] if found else None)[0]
        if rows is not None:
            for name, weight in layer.weights.items():
                weight.copy_(processes.send(0, found[0][name].to(weight.device) if found else weight.detach()))
        return rows

    def remove(self) -> None:
        """Delete everything: the model is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release(force=True)

    def _save(self, number: int, weights: Mapping[str, Tensor], rows: list[LinearReport]) -> None:
        """Write a file under a temporary name, to the disk, and rename it."""
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        metadata = {"rows": json.dumps([asdict(row) for row in rows]), "sha256": hashed(tensors)}
        unfinished = self.folder / ".unfinished"
        try:
            save_file(tensors, unfinished, metadata=metadata)
            _to_disk(unfinished)
            os.replace(unfinished, self.file(number))
            _to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"layer {number} cannot be written to {self.folder}: {error}. The {number} layers before it are kept "
                "there: make room, and the same run goes on behind them"
            ) from error

    def _load(self, number: int) -> tuple[dict[str, Tensor], list[LinearReport]] | None:
        """Read a file, if there is one; if it is damaged, drop it and all later ones."""
        file = self.file(number)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
                metadata = stored.metadata() or {}
            if hashed(tensors) == metadata["sha256"]:
                rows = [LinearReport.from_dict(row) for row in json.loads(metadata["rows"])]
                return tensors, rows
        except (SafetensorError, OSError, KeyError, ValueError):
            pass
        log.warning("%s is damaged: this layer and those after it are pruned again", file)
        while self.file(number).exists():
            self.file(number).unlink()
            number += 1
        return None


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
