import logging
import random
from types import SimpleNamespace

import pytest
import torch

from wanda_lightning.data.windowed_text import windowed_text
from wanda_lightning.data.windows import (
    consecutive_windows,
    document_windows,
    random_windows,
    tokenize,
    windows_between,
)


@pytest.mark.parametrize("seed", [0, 7])
def test_random_windows_are_those_of_the_reference(seed):
    tokens = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    windows = random_windows(tokens, num_samples=5, sequence_length=32, seed=seed)

    # The calibration loop of locuslab/wanda, which draws from the global generator.
    state = random.getstate()
    random.seed(seed)
    expected = []
    for _ in range(5):
        i = random.randint(0, tokens.shape[0] - 32 - 1)
        expected.append(tokens[i : i + 32])
    random.setstate(state)
    assert torch.equal(windows, torch.stack(expected))


def test_random_windows_leave_the_global_generator_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    random_windows(torch.arange(50), 4, 8, seed=0)
    assert random.random() == expected


def test_random_windows_of_the_shortest_text():
    assert random_windows(torch.arange(9), 3, 8, seed=0).tolist() == [list(range(8))] * 3
    with pytest.raises(ValueError, match=r"8 tokens.*sequence_length=8 need at least 9"):
        random_windows(torch.arange(8), 3, 8, seed=0)


@pytest.mark.parametrize(
    ("samples", "length", "seed", "most"),
    [(0, 7, 0, 5), (6, 7, 1, 100), (20, 7, 2, 4), (9, 16, 3, 9), (1, 3, 0, 100), (3, 4, 3, 100)],
)
def test_windows_between_overlap_nothing_and_miss_no_room(samples, length, seed, most):
    tokens = torch.arange(211)
    taken = set(random_windows(tokens, samples, length, seed).flatten().tolist()) if samples else set()
    windows = windows_between(tokens, samples, length, seed, most)
    seen = windows.flatten().tolist()
    assert torch.equal(windows, windows[:, :1] + torch.arange(length))  # each is a piece of the text
    assert len(set(seen)) == len(seen)
    assert taken.isdisjoint(seen)
    free = "".join("x" if token in taken else "." for token in range(211)).split("x")
    assert len(windows) == min(most, sum(len(gap) // length for gap in free))


def test_windows_start_at_randint_from_0_to_the_length_less_a_window_less_1(tokenizer):
    """As in the papers' own code: of a text that is one token longer than a window, it is always the first."""
    text = tokenize(tokenizer, "some text")
    first, length = text[:-1].tolist(), len(text) - 1
    assert random_windows(text, 8, length, seed=0).tolist() == [first] * 8
    assert document_windows(["some text"] * 8, tokenizer, 8, length, seed=0).tolist() == [first] * 8


def test_no_room_between_windows_is_an_error():
    with pytest.raises(ValueError, match=r"100 random windows of sequence_length=9 leave no room.*20 tokens"):
        windows_between(torch.arange(20), 100, 9, seed=0, max_windows=1)


def test_consecutive_windows_drop_the_rest():
    assert consecutive_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert consecutive_windows(torch.arange(8), 4, max_windows=5).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert consecutive_windows(torch.arange(8), 4, max_windows=1).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"3 tokens.*sequence_length=4"):
        consecutive_windows(torch.arange(3), 4)


@pytest.mark.parametrize(
    ("found", "asked", "usual", "windows", "last"),
    [
        (11, None, None, 2, [8, 9, 10]),
        (10, None, None, 2, [8, 9]),
        (9, None, None, 2, None),  # one token predicts nothing
        (8, None, None, 2, None),
        (11, None, 256, 2, [8, 9, 10]),
        (19, None, 3, 3, None),
        (15, None, 3, 3, None),
        (19, 4, 3, 4, None),
        (19, 5, 3, 4, [16, 17, 18]),
    ],
)
def test_a_text_is_evaluated_to_its_end_or_as_far_as_is_usual(found, asked, usual, windows, last):
    def tokenizer(text, verbose):
        return {"input_ids": [*map(int, text.split())]}

    source = SimpleNamespace(text=lambda *_: " ".join(map(str, range(found))), max_evaluation_windows=usual)
    settings = {"num_samples": 1, "seed": 0, "max_evaluation_windows": asked, "keep_last_window": True}
    whole, rest = windowed_text(source, "evaluation", tokenizer, 4, **settings)
    assert whole.flatten().tolist() == [*range(4 * windows)]
    assert (rest if rest is None else rest.tolist()) == last


def test_document_windows_skip_short_documents(tokenizer):
    as_long = tokenizer.decode(tokenize(tokenizer, "c" * 100)[:10])  # as a window: longer ones are asked for
    documents = ["short", as_long, "a" * 100, "too short", "b" * 200, "never read"]
    reader = iter(documents)
    windows = document_windows(reader, tokenizer, num_samples=2, sequence_length=10, seed=0)
    assert windows.shape == (2, 10)
    assert windows.dtype == torch.int64
    assert [set(tokenizer.decode(window)) for window in windows] == [{"a"}, {"b"}]
    assert list(reader) == ["never read"]


def test_document_windows_start_where_the_seed_says(tokenizer):
    document = " ".join(str(number) for number in range(500))
    tokens = torch.tensor(tokenizer(document)["input_ids"])
    start = random.Random(5).randint(0, len(tokens) - 20 - 1)
    windows = document_windows([document], tokenizer, num_samples=1, sequence_length=20, seed=5)
    assert torch.equal(windows[0], tokens[start : start + 20])


def test_document_windows_never_search_for_ever(tokenizer, monkeypatch):
    monkeypatch.setattr("wanda_lightning.data.windows.MAX_DOCUMENTS", 50)

    def endless():
        while True:
            yield "12 345"

    longest = len(tokenizer("12 345")["input_ids"])
    with pytest.raises(ValueError, match=rf"0 of 50 documents.*sequence_length=64.*the longest has {longest}"):
        document_windows(endless(), tokenizer, num_samples=1, sequence_length=64, seed=0)


def test_tokenize_is_the_tokenizers_default_call_without_its_warning(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(tokenizer, "model_max_length", 4)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    text = "a text of more than four tokens"
    with caplog.at_level(logging.WARNING):
        tokens = tokenize(tokenizer, text)
        assert not caplog.records
        # The tokenizer itself still warns whoever else uses it.
        assert tokens.tolist() == tokenizer(text)["input_ids"]
        assert "longer than the specified maximum" in caplog.text


def test_tokenize_adds_the_tokenizers_special_tokens():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenize(PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>"), "b a").tolist() == [0, 2, 1]
