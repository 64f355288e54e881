"""Text in a file: plain, or in a field of JSON lines."""

import json
from collections.abc import Iterable
from pathlib import Path

from wanda_lightning.data.source import Source, Split, divide, without_nulls

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json")


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
            text = "\n\n".join(without_nulls(self._documents(text), str(self.path), self.text_field))
        return text if self.whole else divide(text, split)

    def _documents(self, lines: str) -> Iterable[str | None]:
        for number, line in enumerate(lines.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path} line {number} is not JSON (one object a line): {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get(self.text_field, 0), str | None):
                fields = ", ".join(record) if isinstance(record, dict) else "no fields"
                raise ValueError(f"{self.path} line {number} has no text in field {self.text_field!r}: it has {fields}")
            yield record[self.text_field]
