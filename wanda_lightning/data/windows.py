"""From text to windows of tokens: always full, never padded.

Shapes: L tokens of a whole text, N windows, T tokens in a window.
"""

import random
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MAX_DOCUMENTS = 100_000
"""At most so many are looked at: of C4's, one of 2048 tokens comes every 20, and one of 131072 may never come."""


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenise a whole text at once, with the special tokens that the tokenizer adds by itself.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The text, of any length.

    Returns:
        Token ids, int64, shape (L,).
    """
    # verbose=False: the warning that the text is longer than the model's limit is beside the point, it is cut next.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64, device="cpu")


def random_windows(token_ids_L: Tensor, num_samples: int, sequence_length: int, seed: int) -> Tensor:
    """Draw windows of a text at random, as the calibration of Wanda and SparseGPT does.

    The starts are those of ``random.seed(seed)`` and one ``random.randint(0, L - sequence_length - 1)`` a window, as in
    the papers' own code, so the same text gives the same windows. The global random state is not touched.

    Args:
        token_ids_L: The text, shape (L,), at least ``sequence_length + 1`` tokens.
        num_samples: Number of windows, N. They may overlap.
        sequence_length: Tokens in a window, T.
        seed: Seed of the draw.

    Returns:
        Token ids, shape (N, T).

    Raises:
        ValueError: If the text is too short.

    Examples:
        >>> random_windows(torch.arange(100), num_samples=2, sequence_length=3, seed=0)
        tensor([[49, 50, 51],
                [53, 54, 55]])
    """
    starts = _random_starts(len(token_ids_L), num_samples, sequence_length, seed)
    return torch.stack([token_ids_L[start : start + sequence_length] for start in starts])


def windows_between(token_ids_L: Tensor, num_samples: int, sequence_length: int, seed: int, max_windows: int) -> Tensor:
    """Take windows from between those of :func:`random_windows`: they overlap neither these nor each other.

    Args:
        token_ids_L: The text, shape (L,).
        num_samples: Number of random windows. They may be 0: then the whole text is free.
        sequence_length: Tokens in a window, T.
        seed: Seed of the draw of the random windows.
        max_windows: Take at most so many, evenly spread over those that there is room for.

    Returns:
        Token ids, shape (N, T), in the order of the text.

    Raises:
        ValueError: If there is no room for a window, or the text is too short.

    Examples:
        >>> windows_between(torch.arange(20), num_samples=1, sequence_length=4, seed=0, max_windows=2)  # 12 to 15
        tensor([[ 0,  1,  2,  3],
                [ 8,  9, 10, 11]])
    """
    found, at = len(token_ids_L), 0
    free: list[int] = []
    for start in [*sorted(_random_starts(found, num_samples, sequence_length, seed)), found]:
        free += range(at, start - sequence_length + 1, sequence_length)
        at = start + sequence_length
    if not free:
        raise ValueError(
            f"{num_samples} random windows of sequence_length={sequence_length} leave no room for another one in a "
            f"text of {found} tokens: use fewer or shorter ones, or a longer text"
        )
    count = min(max_windows, len(free))
    starts = [free[number * len(free) // count] for number in range(count)]
    return torch.stack([token_ids_L[start : start + sequence_length] for start in starts])


def _random_starts(found: int, num_samples: int, sequence_length: int, seed: int) -> list[int]:
    if found <= sequence_length:
        raise ValueError(
            f"the text has {found} tokens, random windows of sequence_length={sequence_length} "
            f"need at least {sequence_length + 1}"
        )
    draw = random.Random(seed)
    return [draw.randint(0, found - sequence_length - 1) for _ in range(num_samples)]


def consecutive_windows(token_ids_L: Tensor, sequence_length: int, max_windows: int | None = None) -> Tensor:
    """Cut a text into windows that do not overlap; the short rest is dropped.

    Args:
        token_ids_L: The text, shape (L,), at least ``sequence_length`` tokens.
        sequence_length: Tokens in a window, T.
        max_windows: Keep only the first so many. Default: all ``L // sequence_length``.

    Returns:
        Token ids, shape (N, T).

    Raises:
        ValueError: If the text is shorter than one window.
    """
    found = len(token_ids_L)
    if found < sequence_length:
        raise ValueError(f"the text has {found} tokens, one window of sequence_length={sequence_length} needs as many")
    windows = found // sequence_length
    if max_windows is not None:
        windows = min(windows, max_windows)
    return token_ids_L[: windows * sequence_length].view(windows, sequence_length)


def document_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    sequence_length: int,
    seed: int,
) -> Tensor:
    """Take one random window from each document that is longer than a window, in the order of the documents.

    Args:
        documents: Texts, read one by one and no further than needed.
        tokenizer: A Hugging Face tokenizer.
        num_samples: Number of windows, N, each from another document.
        sequence_length: Tokens in a window, T.
        seed: Seed of the places in the documents.

    Returns:
        Token ids, shape (N, T).

    Raises:
        ValueError: If fewer than ``num_samples`` of the documents are long enough.
    """
    draw = random.Random(seed)
    windows: list[Tensor] = []
    searched = longest = 0
    for document in islice(documents, MAX_DOCUMENTS):
        token_ids_L = tokenize(tokenizer, document)
        found = len(token_ids_L)
        searched, longest = searched + 1, max(longest, found)
        if found > sequence_length:
            start = draw.randint(0, found - sequence_length - 1)
            windows.append(token_ids_L[start : start + sequence_length])
            if len(windows) == num_samples:
                return torch.stack(windows)
    raise ValueError(
        f"only {len(windows)} of {searched} documents are longer than sequence_length={sequence_length} tokens, "
        f"num_samples={num_samples} wanted; the longest has {longest}: use a shorter sequence_length or fewer samples"
    )
