"""Text in a file: plain, or in a field of JSON lines, which may hold conversations too."""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from wanda_lightning.data.documents import Document, is_document, joined
from wanda_lightning.data.source import Source, Split, divide

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json")


class FileText(Source):
    """A text file, or a file with one JSON object a line; divided in contiguous parts unless ``whole``."""

    def __init__(self, path: Path, whole: bool = False, text_field: str = "text"):
        self.path, self.whole, self.text_field = path, whole, text_field

    def text(self, split: Split, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """Return the split's part of the file; the texts of JSON lines are joined with blank lines."""
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}") from None
        if self.path.suffix.lower() in JSON_SUFFIXES:
            text = joined(self._documents(text), "\n\n", tokenizer, str(self.path), self.text_field)
        return text if self.whole else divide(text, split)

    def _documents(self, lines: str) -> Iterable[Document | None]:
        for number, line in enumerate(lines.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path} line {number} is not JSON (one object a line): {error}") from None
            if not isinstance(record, dict) or self.text_field not in record:
                fields = ", ".join(record) if isinstance(record, dict) else "no fields"
                raise ValueError(f"{self.path} line {number} has no text_field {self.text_field!r}, it has {fields}")
            document = record[self.text_field]
            if not is_document(document):
                raise ValueError(
                    f"{self.path} line {number} has neither text nor messages with role and content in field "
                    f"{self.text_field!r}: {repr(document)[:100]}"
                )
            yield document
