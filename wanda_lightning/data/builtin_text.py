"""Text that needs no download: what every CPython carries."""

from transformers import PreTrainedTokenizerBase

from wanda_lightning.data.source import SHARES, Source, Split


class BuiltinText(Source):
    """Python's own language reference, 0.35 MB of English that every CPython carries (``pydoc_data.topics``).

    Topics are dealt out whole. They quote each other at length, so of each repeated paragraph one copy is kept: else
    evaluation would test on text that calibration has seen.
    """

    def __init__(self, whole: bool = False):
        self.whole = whole

    def text(self, split: Split, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
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
