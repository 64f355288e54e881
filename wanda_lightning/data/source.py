"""What a source of text is, and how one without splits of its own is divided.

Nothing is read or downloaded before a split of it is asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "train", "evaluation"]

WITHOUT_HUB = (
    'without a hub these work: "builtin", a .txt, .md, .jsonl or .json file, or a local folder of a data set, such as '
    "one with .csv or .parquet files"
)

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
    def text(self, split: Split, tokenizer: PreTrainedTokenizerBase | None = None) -> str | Iterable[str]:
        """Return one long text, or documents from each of which one window is to be taken.

        Args:
            split: The part of the text.
            tokenizer: Its chat template makes text of conversations; not needed where the source holds text.
        """


def divide(text: str, split: Split) -> str:
    """Cut a split's share out of a text, at the ends of lines where there are any nearby."""

    def position(tenths: int) -> int:
        at = len(text) * tenths // 10
        return text.find("\n", at, at + len(text) // 10) + 1 or at

    first, last = SHARES[split]
    return text[position(first) if first else 0 : position(last)]
