"""Text of the `datasets` library, and C4 as the pruning papers take it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from wanda_lightning.data.documents import Document, is_document, joined
from wanda_lightning.data.source import WITHOUT_HUB, Source, Split, divide

AS_WRITTEN = {"sample_by": "document", "keep_default_na": False, "na_values": [""]}
"""Settings of some of the library's readers: a .txt is a document, not one a line, and "null" in a .csv is a word."""


class DatasetText(Source):
    """A data set of the `datasets` library: on the hub, or a local folder of data files or of ``save_to_disk``.

    Its documents are joined to one text: blank lines between them, or ``train_separator``. They may be conversations.
    Code that comes with a data set is never run.
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

    def text(self, split: Split, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """Return the documents of a split as one text."""
        evaluation = split == "evaluation"
        documents = self._documents(self.evaluation_split if evaluation else self.train_split)
        text = joined(documents, "\n\n" if evaluation else self.train_separator, tokenizer, self.name, self.text_field)
        return text if self.whole or self.train_split != self.evaluation_split else divide(text, split)

    def _load(self) -> Mapping[str, Any]:
        folder = Path(self.name)
        if not folder.is_dir():
            return _load_dataset(self.name, name=self.config_name)
        from datasets import Dataset, load_dataset, load_dataset_builder, load_from_disk

        try:
            if not (folder / "dataset_dict.json").exists() and not (folder / "state.json").exists():
                # A folder named "json" or "text" would be one of the library's own readers.
                place, name = str(folder.absolute()), self.config_name
                config = load_dataset_builder(place, name=name).config
                return load_dataset(place, name=name, **{k: v for k, v in AS_WRITTEN.items() if hasattr(config, k)})
            loaded = load_from_disk(self.name)
        except Exception as error:  # data files have as many ways to be wrong as there are formats
            cause = error.__cause__ or error  # the library may say no more than that an error occurred
            raise ValueError(f"the folder {self.name!r} is no data set that can be read: {cause}") from error
        return {"train": loaded} if isinstance(loaded, Dataset) else loaded

    def _documents(self, split: str) -> list[Document | None]:
        splits = self._load()
        # "train[:1%]" is the library's own syntax for a part of a split.
        name, bracket, _ = split.partition("[")
        if name not in splits:
            raise ValueError(
                f"{self.name!r} has no split {name!r}, it has {', '.join(splits)}: set train_split and "
                "evaluation_split (the same name for both divides the split in disjoint parts)"
            )
        rows = _part(splits, split) if bracket else splits[name]
        if self.text_field not in rows.column_names:
            raise ValueError(
                f"{self.name!r} has no text_field {self.text_field!r}, it has {', '.join(rows.column_names)}"
            )
        documents = rows[self.text_field][:]
        if not all(map(is_document, documents)):
            raise ValueError(
                f"{self.name!r} has rows whose field {self.text_field!r} holds neither text nor messages with role and "
                "content"
            )
        return documents


class C4(Source):
    """The first shards of C4 (arXiv:1910.10683), streamed, as in the pruning papers.

    Calibration takes one window from each of some documents; training has 10,000 other documents; evaluation is the
    first 1100 documents of validation, cut to 256 windows.
    """

    max_evaluation_windows = 256
    train_documents, evaluation_documents = 10_000, 1100

    def __init__(self, seed: int):
        self.seed = seed

    def text(self, split: Split, tokenizer: PreTrainedTokenizerBase | None = None) -> str | Iterable[str]:
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


def _part(splits: Mapping[str, Any], split: str) -> Any:
    """Take what "train[:1%]" names, or several such parts with a plus between them, out of splits."""
    from datasets import ReadInstruction, concatenate_datasets

    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _load_dataset(path: str, **options: Any) -> Any:
    """Load from the hub or its cache; trust_remote_code is never given."""
    import datasets

    try:
        return datasets.load_dataset(path, **options)
    except OSError as error:  # no connection, or no such data set
        raise ConnectionError(f"the data set {path!r} could not be reached: {error}; {WITHOUT_HUB}") from error
