"""Where text comes from: built in, a file, a data set, or one of the two presets of the pruning papers."""

import os.path
from pathlib import Path

from wanda_lightning.data.builtin_text import BuiltinText
from wanda_lightning.data.datasets_text import C4, DatasetText
from wanda_lightning.data.source import WITHOUT_HUB, Source
from wanda_lightning.data.text_file import JSON_SUFFIXES, TEXT_SUFFIXES, FileText


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
        text_field: The field of a JSON line, or the column of a data set, that holds the text or conversations.
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
    if suffix in TEXT_SUFFIXES + JSON_SUFFIXES and not os.path.isdir(path):  # a Path raises where a name is too long
        if not os.path.isfile(path):
            raise ValueError(f"the file {name!r} does not exist; {WITHOUT_HUB}")
        return FileText(path, whole, text_field)
    is_on_no_hub = path.is_absolute() or name.startswith(".") or any(map(str.isspace, name))
    if not name or os.path.isfile(path) or (is_on_no_hub and not os.path.exists(path)):
        raise ValueError(f"{name!r:.100} is no source of text; {WITHOUT_HUB}")
    return DatasetText(location, config_name, train_split, evaluation_split, text_field, whole)
