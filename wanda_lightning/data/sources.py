"""Where text comes from: built in, a file, a data set, or one of the two presets of the pruning papers.

Nothing is read or downloaded before a split of it is asked for.
"""

import json
import os.path
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

Split = Literal["calibration", "train", "evaluation"]

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json")
WITHOUT_HUB = 'without a hub these work: "builtin", a .txt, .md, .jsonl or .json file, or a local folder of a data set'

# A text without splits of its own is divided 3 : 4 : 3 into calibration, training and evaluation.
SHARES: dict[Split, tuple[int, int]] = {"calibration": (0, 3), "train": (3, 7), "evaluation": (7, 10)}


class Source(ABC):
    """Text for calibration, training and evaluation.

    Attributes:
        max_evaluation_windows: How many windows the usual evaluation on this text has, None = all.
    """

    max_evaluation_windows: int | None = None

    def prepare(self) -> None:
        """Download what is not there yet; called on one process only."""

    @abstractmethod
    def text(self, split: Split) -> str | Iterable[str]:
        """Return one long text, or documents from each of which one window is to be taken."""


def open_source(
    name: str,
    *,
    whole: bool = False,
    text_field: str = "text",
    config_name: str | None = None,
    train_split: str = "train",
    evaluation_split: str = "test",
    seed: int = 0,
) -> Source:
    """Find the source that a string names. Nothing is read yet.

    Args:
        name: ``"builtin"``; the path of a .txt, .md, .jsonl or .json file; ``"wikitext2"``; ``"c4"``; a local folder
            that holds a data set; or the name of a data set on the hub.
        whole: Do not divide a text that has no splits of its own: every split is all of it.
        text_field: The field of a JSON line, or the column of a data set, that holds the text.
        config_name: Configuration of a data set that has several.
        train_split: Split of a data set for calibration and training.
        evaluation_split: Split of a data set for evaluation. Where it is the same as ``train_split``, the split is
            divided in disjoint parts.
        seed: Seed of the order of the documents of C4.

    Returns:
        The source.

    Raises:
        ValueError: If a file is named that does not exist or cannot be read as text.
    """
    location = os.path.expanduser(name)
    path = Path(location)
    suffix = path.suffix.lower()
    if name == "builtin":
        return BuiltinText(whole)
    if name == "wikitext2":
        return DatasetText("Salesforce/wikitext", "wikitext-2-raw-v1", train_separator=" ")
    if name == "c4":
        return C4(seed)
    if suffix in TEXT_SUFFIXES + JSON_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"the file {name!r} does not exist; {WITHOUT_HUB}")
        return FileText(path, whole, text_field)
    looks_local = path.is_absolute() or name.startswith(".")
    if not name or path.is_file() or (looks_local and not path.exists()):
        raise ValueError(f"{name!r} is no source of text; {WITHOUT_HUB}")
    return DatasetText(location, config_name, train_split, evaluation_split, text_field, whole)


class BuiltinText(Source):
    """Python's own language reference, 0.35 MB of English that every CPython carries (``pydoc_data.topics``).

    Topics are dealt out whole. They quote each other at length, so of each repeated paragraph one copy is kept: else
    evaluation would test on text that calibration has seen.
    """

    def __init__(self, whole: bool = False):
        self.whole = whole

    def text(self, split: Split) -> str:
        """Return the topics of a split, in alphabetical order."""
        topics = self._topics()
        parts: dict[Split, list[str]] = {part: [] for part in SHARES}
        dealt = dict.fromkeys(SHARES, 0)
        # The largest topic first, each to the part that has least of its share: parts of like size and mixed content.
        for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
            part = min(SHARES, key=lambda part: dealt[part] / (SHARES[part][1] - SHARES[part][0]))
            parts[part].append(name)
            dealt[part] += len(topics[name])
        return "\n\n".join(topics[name] for name in sorted(topics if self.whole else parts[split]))

    @staticmethod
    def _topics() -> dict[str, str]:
        from pydoc_data.topics import topics

        seen: set[str] = set()
        kept: dict[str, str] = {}
        for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
            fresh = []
            for paragraph in topics[name].split("\n\n"):
                words = " ".join(paragraph.split())
                if words not in seen:
                    seen.add(words)
                    fresh.append(paragraph)
            if fresh:
                kept[name] = "\n\n".join(fresh)
        return kept


class FileText(Source):
    """A text file, or a file with one JSON object a line; divided in contiguous parts unless ``whole``."""

    def __init__(self, path: Path, whole: bool = False, text_field: str = "text"):
        self.path, self.whole, self.text_field = path, whole, text_field

    def text(self, split: Split) -> str:
        """Return the split's part of the file; the texts of JSON lines are joined with blank lines."""
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}") from None
        if self.path.suffix.lower() in JSON_SUFFIXES:
            text = "\n\n".join(self._documents(text))
        return text if self.whole else divide(text, split)

    def _documents(self, lines: str) -> Iterable[str]:
        for number, line in enumerate(lines.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path} line {number} is not JSON (one object a line): {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get(self.text_field), str):
                fields = ", ".join(record) if isinstance(record, dict) else "no fields"
                raise ValueError(f"{self.path} line {number} has no text in field {self.text_field!r}: it has {fields}")
            yield record[self.text_field]


class DatasetText(Source):
    """A data set of the `datasets` library: on the hub, or a local folder of data files or of ``save_to_disk``.

    Its documents are joined to one text: blank lines between them, or ``train_separator``. Code that comes with a data
    set is never run.
    """

    def __init__(
        self,
        name: str,
        config_name: str | None = None,
        train_split: str = "train",
        evaluation_split: str = "test",
        text_field: str = "text",
        whole: bool = False,
        train_separator: str = "\n\n",
    ):
        self.name, self.config_name, self.text_field, self.whole = name, config_name, text_field, whole
        self.train_split, self.evaluation_split, self.train_separator = train_split, evaluation_split, train_separator

    def prepare(self) -> None:
        """Download the data set into the cache of `datasets`."""
        self._load()

    def text(self, split: Split) -> str:
        """Return the documents of a split as one text."""
        evaluation = split == "evaluation"
        documents = self._documents(self.evaluation_split if evaluation else self.train_split)
        text = ("\n\n" if evaluation else self.train_separator).join(documents)
        return text if self.whole or self.train_split != self.evaluation_split else divide(text, split)

    def _load(self) -> Mapping[str, Any]:
        folder = Path(self.name)
        if not folder.is_dir():
            return _load_dataset(self.name, name=self.config_name)
        from datasets import Dataset, load_dataset, load_from_disk

        try:
            if not (folder / "dataset_dict.json").exists() and not (folder / "state.json").exists():
                return load_dataset(self.name, name=self.config_name)
            loaded = load_from_disk(self.name)
        except Exception as error:  # data files have as many ways to be wrong as there are formats
            raise ValueError(f"the folder {self.name!r} is no data set that can be read: {error}") from error
        return {"train": loaded} if isinstance(loaded, Dataset) else loaded

    def _documents(self, split: str) -> list[str]:
        splits = self._load()
        # "train[:1%]" is the library's own syntax for a part of a split.
        name, bracket, _ = split.partition("[")
        if name not in splits:
            raise ValueError(
                f"{self.name!r} has no split {name!r}, it has {', '.join(splits)}: set train_split and "
                "evaluation_split (the same name for both divides the split in disjoint parts)"
            )
        rows = _load_dataset(self.name, name=self.config_name, split=split) if bracket else splits[name]
        if self.text_field not in rows.column_names:
            raise ValueError(
                f"{self.name!r} has no text_field {self.text_field!r}, it has {', '.join(rows.column_names)}"
            )
        documents = rows[self.text_field][:]
        if not all(isinstance(document, str) for document in documents):
            raise ValueError(f"{self.name!r} has rows whose field {self.text_field!r} is not text")
        return documents


class C4(Source):
    """The first shards of C4 (arXiv:1910.10683), streamed, as in the pruning papers.

    Calibration takes one window from each of some documents; training has 10,000 other documents; evaluation is the
    first 1100 documents of validation, cut to 256 windows.
    """

    max_evaluation_windows = 256
    train_documents, evaluation_documents = 10_000, 1100

    def __init__(self, seed: int = 0):
        self.seed = seed

    def text(self, split: Split) -> str | Iterable[str]:
        """Return documents in random order for calibration, and joined with spaces for training and evaluation."""
        if split == "evaluation":
            rows = self._stream("validation", "en/c4-validation.00000-of-00008.json.gz")
            return " ".join(row["text"] for row in rows.take(self.evaluation_documents))
        rows = self._stream("train", "en/c4-train.00000-of-01024.json.gz")
        if split == "train":
            return " ".join(row["text"] for row in rows.take(self.train_documents))
        return (row["text"] for row in rows.skip(self.train_documents).shuffle(seed=self.seed, buffer_size=10_000))

    @staticmethod
    def _stream(split: str, file: str) -> Any:
        return _load_dataset("allenai/c4", data_files={split: file}, split=split, streaming=True)


def divide(text: str, split: Split) -> str:
    """Cut a split's share out of a text, at the ends of lines where there are any nearby."""

    def position(tenths: int) -> int:
        at = len(text) * tenths // 10
        return text.find("\n", at, at + len(text) // 10) + 1 or at

    first, last = SHARES[split]
    return text[position(first) if first else 0 : position(last)]


def _load_dataset(path: str, **options: Any) -> Any:
    """Load from the hub or its cache; trust_remote_code is never given."""
    import datasets

    try:
        return datasets.load_dataset(path, **options)
    except OSError as error:  # no connection, or no such data set
        raise ConnectionError(f"the data set {path!r} could not be reached: {error}; {WITHOUT_HUB}") from error
