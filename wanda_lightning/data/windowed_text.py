"""The windows of a source that belong to a split. Shapes: L tokens of a text, N windows, T tokens in a window."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wanda_lightning.data.source import Source, Split
from wanda_lightning.data.windows import (
    consecutive_windows,
    document_windows,
    random_windows,
    tokenize,
    windows_between,
)


def windowed_text(
    source: Source,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    num_samples: int,
    seed: int,
    max_evaluation_windows: int | None,
    keep_last_window: bool,
) -> tuple[Tensor, Tensor | None]:
    """Read a split of a source as windows: random ones for calibration, else consecutive ones.

    Args:
        source: The text.
        split: The part of the text.
        tokenizer: A Hugging Face tokenizer.
        sequence_length: Tokens in a window, T.
        num_samples: Number of calibration windows.
        seed: Seed of the choice of calibration windows.
        max_evaluation_windows: Evaluate on the first so many windows. Default: all, or what is usual for the source.
        keep_last_window: Return the last, shorter window of evaluation too.

    Returns:
        Token ids, shape (N, T); and of the last, shorter window, shape (fewer than T,), if it is wanted and there.

    Raises:
        ValueError: If the text is too short.
    """
    text = source.text(split, tokenizer)
    if not isinstance(text, str):
        return document_windows(text, tokenizer, num_samples, sequence_length, seed), None
    token_ids_L = tokenize(tokenizer, text)
    if split == "calibration":
        return random_windows(token_ids_L, num_samples, sequence_length, seed), None
    if split == "train":
        return consecutive_windows(token_ids_L, sequence_length), None
    most = max_evaluation_windows or source.max_evaluation_windows
    windows_NT = consecutive_windows(token_ids_L, sequence_length, most)
    rest = token_ids_L[len(windows_NT) * sequence_length :]
    # One token alone has nothing to predict; and what is left where windows are limited is not wanted.
    kept = keep_last_window and len(rest) >= 2 and len(windows_NT) != most
    return windows_NT, rest if kept else None


def held_out_windows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    num_samples: int,
    seed: int,
    max_windows: int,
) -> Tensor:
    """Take windows of the source of calibration that neither calibration nor evaluation sees.

    They are of the part for training, between the windows of calibration where both have the same text. Of a source of
    documents they are of the documents behind those of calibration.

    Args:
        source: The text.
        tokenizer: A Hugging Face tokenizer.
        sequence_length: Tokens in a window, T.
        num_samples: Number of calibration windows.
        seed: Seed of the choice of calibration windows.
        max_windows: Take at most so many.

    Returns:
        Token ids, shape (N, T).

    Raises:
        ValueError: If the text is too short.
    """
    calibration = source.text("calibration", tokenizer)
    if not isinstance(calibration, str):
        return document_windows(calibration, tokenizer, num_samples + max_windows, sequence_length, seed)[num_samples:]
    text = source.text("train", tokenizer)
    between = num_samples if text == calibration else 0
    return windows_between(tokenize(tokenizer, str(text)), between, sequence_length, seed, max_windows)


class KnownWindows:
    """Windows made before with the same tokenizer and settings: a datamodule may serve several models, and change."""

    def __init__(self) -> None:
        self._windows: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._made_for: tuple[PreTrainedTokenizerBase, int, dict[str, Any]] | None = None

    def get(
        self,
        key: str,
        source: Source,
        split: Split,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what :func:`windowed_text` gives for a key, and make it if it is not known."""
        if self._made_for != (tokenizer, sequence_length, settings):
            self._windows.clear()
            self._made_for = tokenizer, sequence_length, settings
        if key not in self._windows:
            self._windows[key] = windowed_text(source, split, tokenizer, sequence_length, **settings)
        return self._windows[key]
