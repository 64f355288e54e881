"""Text in a file: plain, or in a field of JSON lines or of a JSON list, which may hold conversations too."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from wanda_lightning.data.documents import Document, is_document, joined
from wanda_lightning.data.source import Source, Split, divide

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json")


class FileText(Source):
    """A text file, or JSON with one object a line or a list of them; divided in contiguous parts unless ``whole``."""

    def __init__(self, path: Path, whole: bool = False, text_field: str = "text"):
        self.path, self.whole, self.text_field = path, whole, text_field

    def text(self, split: Split, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """Return the split's part of the file; the texts of JSON are joined with blank lines.

        Half a character, as an escaped emoji that was cut in two, is no Unicode, and becomes U+FFFD.
        """
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}") from None
        if self.path.suffix.lower() in JSON_SUFFIXES:
            text = joined(self._documents(text), "\n\n", tokenizer, str(self.path), self.text_field)
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text if self.whole else divide(text, split)

    def _documents(self, text: str) -> Iterator[Document | None]:
        for place, record in self._records(text):
            if isinstance(record, str):
                yield record
                continue
            if not isinstance(record, dict) or self.text_field not in record:
                has = f"it has {', '.join(record)}" if isinstance(record, dict) else f"it is {record!r:.100}"
                raise ValueError(f"{self.path} {place} has no text_field {self.text_field!r}, {has}")
            document = record[self.text_field]
            if not is_document(document):
                raise ValueError(
                    f"{self.path} {place} has neither text nor messages with role and content in field "
                    f"{self.text_field!r}: {repr(document)[:100]}"
                )
            yield document

    def _records(self, text: str) -> Iterator[tuple[str, Any]]:
        """Yield the objects or texts of the file, and the place of each."""
        if text.lstrip().startswith("["):
            for number, record in enumerate(self._parsed(text, "which begins like a list,"), 1):
                yield f"record {number}", record
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", self._parsed(line, f"line {number}")

    def _parsed(self, text: str, place: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} {place} is not JSON (one object a line, or one list): {error}") from None
