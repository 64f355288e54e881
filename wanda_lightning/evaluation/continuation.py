"""The bundled task ``builtin_continuation``: which of four passages continues this one?

It is built from the evaluation part of the built-in text, Python's language reference, with a fixed seed; no download.
It is ours and **not a benchmark**: figures compare only with our own, under one version of Python, whose text it is.
The right answer is the passage that follows in the same paragraph; the wrong ones come from other places in the text.
Passages are one or more whole sentences; answers are cut to 100 characters.
"""

import platform
import random
import re
from textwrap import shorten
from typing import Any

from wanda_lightning.data.builtin_text import BuiltinText

NAME = "builtin_continuation"
SEED = 0
CHOICES = 4
PASSAGE_WORDS = 8  # at least
CONTEXT, ANSWER = 400, 100  # characters at most: the end of the context, the start of the answer


def questions() -> list[dict[str, Any]]:
    """Build the questions: ``context``, ``choices`` (four strings) and ``label`` (index of the right one)."""
    draw = random.Random(SEED)
    passages = [passage for paragraph in _prose() for passage in [*_passages(paragraph), None]]
    places = [place for place, passage in enumerate(passages) if passage is not None]
    rows = []
    for place in places:
        context, right = passages[place - 1], passages[place]  # before the first is the last, which is None
        if context is None or right is None:  # the first passage of a paragraph continues nothing
            continue
        others = draw.sample([other for other in places if abs(other - place) > 1], CHOICES - 1)
        order = draw.sample([place, *others], CHOICES)
        choices = [shorten(passages[choice] or "", ANSWER, placeholder="") for choice in order]
        if len(set(choices)) == CHOICES:
            rows.append({"context": _end(context), "choices": choices, "label": order.index(place)})
    draw.shuffle(rows)  # so that the first so many are a fair sample
    return rows


def config() -> dict[str, Any]:
    """Return the task's configuration for lm-eval."""
    return {
        "task": NAME,
        "custom_dataset": dataset,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0, "python": platform.python_version()},
    }


def dataset(**_: Any) -> dict[str, Any]:
    """Return the questions as lm-eval wants them: data sets by split."""
    from datasets import Dataset

    return {"test": Dataset.from_list(questions())}


def _prose() -> list[str]:
    """Return the paragraphs that are sentences; not headings, code or grammar."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in BuiltinText().text("evaluation").split("\n\n")]
    return [text for text in paragraphs if sum(char.isalpha() or char in " ,.'" for char in text) > 0.88 * len(text)]


def _passages(paragraph: str) -> list[str]:
    """Split a paragraph at the ends of sentences, into passages of at least ``PASSAGE_WORDS`` words."""
    passages: list[list[str]] = [[]]
    for sentence in re.split(r"(?<=[a-z\")][.:;]) ", paragraph):
        if len(passages[-1]) >= PASSAGE_WORDS:
            passages.append([])
        passages[-1] += sentence.split()
    return [" ".join(words) for words in passages if len(words) >= PASSAGE_WORDS]


def _end(context: str) -> str:
    """Cut a context from the left, between words."""
    return context if len(context) <= CONTEXT else context[-CONTEXT:].partition(" ")[2]
