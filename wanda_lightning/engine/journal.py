"""What a pruning has finished so far, layer by layer on disk, so that a crash costs at most the layer it was at.

A folder with ``run.json``, which says what run it is, and a safetensors file for each finished layer: its pruned
weights (the masks are where they are not zero) and the rows of its report.
"""

import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from wanda_lightning.atomic_files import write_text
from wanda_lightning.engine.fingerprint import differences
from wanda_lightning.engine.layer_file import read, write
from wanda_lightning.engine.linear_pruning import PrunedLayer
from wanda_lightning.engine.processes import Processes
from wanda_lightning.model.decoder import DecoderLayer

log = logging.getLogger(__name__)

OWN = re.compile(r"layer-\d{5}\.safetensors|(run|allocation)\.json|lock")
"""The names of its files."""
HALF_WRITTEN = re.compile(r"\.(layer-\d{5}|run|allocation)-\w{8}\.(safetensors|json)|\.tmp\w{6}")
"""What a write that was killed may leave: of ``atomic_files.whole_file``, and of safetensors."""


class Journal:
    """The finished layers of one pruning; only one run at a time may write to them.

    Args:
        folder: Where they are kept; made when it is locked.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self._lock = FileLock(self.folder / "lock", is_singleton=True)
        self._made = False  # the folder that it stands in

    def lock(self) -> None:
        """Keep other processes out, until :meth:`release` or the end of this one, however that comes.

        Raises:
            ValueError: If another process is writing there, or there are files that are not a journal's; hidden ones,
                such as the system makes in any folder, are left alone.
        """
        if self._lock.is_locked:
            return
        there = [file.name for file in self.folder.glob("[!.]*")]
        if others := [name for name in there if not OWN.fullmatch(name)]:
            raise ValueError(f"{self.folder} holds files of another kind, such as {others[0]}: choose another folder")
        self._made = self._made or not self.folder.parent.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run is writing to {self.folder.parent}: wait for it, or choose another folder"
            ) from None

    def release(self) -> None:
        """Let other processes in; leave nothing behind where nothing was begun."""
        if self._lock.is_locked and not (self.folder / "run.json").exists():
            self._delete(OWN, HALF_WRITTEN)
            with suppress(OSError):  # where there are other files
                self.folder.rmdir()
                if self._made:
                    self.folder.parent.rmdir()
        self._lock.release(force=True)

    @classmethod
    def none(cls) -> "Journal":
        """Return a journal that keeps nothing."""
        return _NoJournal()

    def start(self, fingerprint: Mapping[str, Any], processes: Processes) -> None:
        """Begin a run, or go on with it.

        Args:
            fingerprint: What decides its results, by name; plain types.
            processes: Those that take part; the first of them writes.

        Raises:
            ValueError: If the folder holds another run (it says where they differ), or another process is writing
                there.
        """
        with processes.together():
            if processes.rank == 0:
                self._start(fingerprint)

    def _start(self, fingerprint: Mapping[str, Any]) -> None:
        self.lock()
        self._delete(HALF_WRITTEN)
        file = self.folder / "run.json"
        fingerprint = json.loads(json.dumps(dict(fingerprint)))  # as it will be read back
        if file.exists():
            self._refuse_other(file, fingerprint)
        else:
            self._drop(0)  # a folder whose deletion was cut short, and nobody knows whose layers those are
            (self.folder / "allocation.json").unlink(missing_ok=True)
            write_text(file, json.dumps(fingerprint, indent=2) + "\n")
        if finished := len(self._files()):
            log.warning("layers finished before: %d, in %s; the run goes on behind them", finished, self.folder)

    @property
    def allocation(self) -> Path | None:
        """The file in which an allocator's decision is kept; None where nothing is kept."""
        return self.folder / "allocation.json"

    def file(self, layer: int) -> Path | None:
        """Name the file of a layer; None where nothing is kept."""
        return self._file(layer)

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def record(self, number: int, layer: DecoderLayer, done: PrunedLayer, processes: Processes) -> None:
        """Make a pruned layer durable; no process goes on before it is.

        Args:
            number: Number of the layer.
            layer: The layer, pruned.
            done: What was done to it.
            processes: All of them call this; the first one writes.

        Raises:
            OSError: If it cannot be written; the layers before it are kept.
        """
        with processes.together():
            if processes.rank == 0:
                self._save(number, layer.weights, done)

    def restore(self, number: int, layer: DecoderLayer, processes: Processes) -> PrunedLayer | None:
        """Put a layer in the state in which it was recorded; return what was done, or None if it was not recorded."""
        with processes.together():
            found = self._load(number) if processes.rank == 0 else None
        done = processes.gather(found[1] if found else None)[0]
        if done is not None:
            for name, weight in layer.weights.items():
                weight.copy_(processes.send(0, found[0][name].to(weight.device) if found else weight.detach()))
        return done

    def remove(self) -> None:
        """Delete its files, and the folder if nothing else is in it: the model is saved, or the layers are not wanted.

        Raises:
            ValueError: If another process is writing there.
        """
        if (self.folder / "lock").exists():  # else it is no journal
            self.lock()
            (self.folder / "run.json").unlink(missing_ok=True)  # first: without it the rest is void
        self.release()

    def _delete(self, *names: re.Pattern[str]) -> None:
        """Delete the files of such names, as far as that goes."""
        for file in [*self.folder.glob("*")]:
            if any(name.fullmatch(file.name) for name in names):
                with suppress(OSError):
                    file.unlink()

    def _refuse_other(self, file: Path, fingerprint: Mapping[str, Any]) -> None:
        """Make sure that the folder is of the run that begins."""
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): nobody can tell which run the layers beside it are of. Delete "
                f"{self.folder}, and the run starts over"
            ) from None
        if other := differences(found, fingerprint):
            reload = " A model that was pruned or trained in part has to be loaded again." if "weights" in other else ""
            raise ValueError(
                f"{self.folder} holds the finished layers of another run: {'; '.join(other.values())}. Run that one to "
                f"its end, delete the folder (or say resume=False once) to start over, or choose another.{reload}"
            )

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("layer-?????.safetensors"))

    def _drop(self, number: int) -> None:
        """Delete the files of a layer and of those behind it: their inputs came out of it."""
        for file in self._files():
            if file >= self._file(number):
                file.unlink()

    def _save(self, number: int, weights: Mapping[str, Tensor], done: PrunedLayer) -> None:
        """Write the file of a layer, whole and to the disk."""
        try:
            write(self._file(number), weights, done)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"layer {number} cannot be written to {self.folder}: {error}. The {number} layers before it are kept "
                "there: make room, and the same run goes on behind them"
            ) from error

    def _load(self, number: int) -> tuple[dict[str, Tensor], PrunedLayer] | None:
        """Read a file, if there is one; if it is damaged, drop it and all later ones."""
        file = self._file(number)
        if file.exists():
            try:
                return read(file)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                log.warning("%s is damaged (%s): this layer and those after it are pruned again", file, error)
        self._drop(number)
        return None


class _NoJournal(Journal):
    """Keeps nothing."""

    def __init__(self) -> None:
        pass

    def lock(self) -> None:
        pass

    def release(self) -> None:
        pass

    def remove(self) -> None:
        pass

    def start(self, fingerprint: Mapping[str, Any], processes: Processes) -> None:
        pass

    @property
    def allocation(self) -> None:
        return None

    def file(self, layer: int) -> None:
        return None

    def record(self, number: int, layer: DecoderLayer, done: PrunedLayer, processes: Processes) -> None:
        pass

    def restore(self, number: int, layer: DecoderLayer, processes: Processes) -> None:
        return None
