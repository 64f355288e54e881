"""Conversations as text: what the chat template of a tokenizer makes of their messages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Conversation = Sequence[Mapping[str, Any]]
Document = str | Conversation


def is_conversation(value: object) -> TypeGuard[Conversation]:
    """Tell whether a value is a list of messages, each with a ``role`` and a ``content``."""
    return isinstance(value, list) and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)


def joined(documents: Iterable[Document], separator: str, tokenizer: PreTrainedTokenizerBase | None, name: str) -> str:
    """Join documents to one text; conversations become text by the chat template, which says where each ends.

    Args:
        documents: Texts or conversations.
        separator: What stands between texts.
        tokenizer: A Hugging Face tokenizer; needed for conversations only.
        name: Name of the source, for messages.

    Returns:
        The text.

    Raises:
        ValueError: If there are conversations, and no chat template or one that does not take them.
    """
    every = list(documents)
    if all(isinstance(document, str) for document in every):
        return separator.join(map(str, every))
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{name} holds conversations, and the tokenizer has no chat template that makes text of them: take the "
            "tokenizer of an instruction-tuned model, or data that hold text"
        )
    return "".join(_text(document, tokenizer, f"{name}, document {n}") for n, document in enumerate(every, 1))


def _text(document: Document, tokenizer: Any, place: str) -> str:
    if isinstance(document, str) or not document:  # a conversation of which nothing is there
        return str(document or "")
    try:
        return tokenizer.apply_chat_template(document, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"{place}: the tokenizer's chat template does not take this conversation: {error}") from error
