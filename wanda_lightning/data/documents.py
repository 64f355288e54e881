"""The documents of a source, joined to one text: texts, or conversations that a chat template makes text of."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Document = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: a list of messages, each with a ``role``, and a ``content`` or ``tool_calls``."""

log = logging.getLogger(__name__)


def is_document(value: object) -> TypeGuard[Document | None]:
    """Tell whether a value is a document, or null."""
    if isinstance(value, list):
        return all(
            isinstance(each, Mapping) and "role" in each and {"content", "tool_calls"} & each.keys() for each in value
        )
    return value is None or isinstance(value, str)


def joined(
    documents: Iterable[Document | None],
    separator: str,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    field: str,
) -> str:
    """Join documents to one text; those that are null are left out, and the log says how many there were.

    Args:
        documents: Texts or conversations, and None in place of those that are null.
        separator: What stands between texts; of conversations the chat template says where each ends.
        tokenizer: A Hugging Face tokenizer; needed for conversations only.
        name: Name of the source, for messages.
        field: The field that holds the documents, for messages.

    Returns:
        The text.

    Raises:
        ValueError: If all documents are null, or there are conversations, and no chat template or one that does not
            take them.
    """
    every = list(documents)
    kept = [document for document in every if document is not None]
    if every and not kept:
        raise ValueError(f"{name} has no text in field {field!r}: it is null in all {len(every)} records")
    if len(kept) < len(every):
        log.warning(
            "%s: %d of %d records have null for %s and are left out", name, len(every) - len(kept), len(every), field
        )
    texts = [document for document in kept if isinstance(document, str)]
    if len(texts) == len(kept):
        return separator.join(texts)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{name} holds conversations, and the tokenizer has no chat template that makes text of them: take the "
            "tokenizer of an instruction-tuned model, or data that hold text"
        )
    return "".join(_text(document, tokenizer, f"{name}, document {n}") for n, document in enumerate(kept, 1))


def _text(document: Document, tokenizer: Any, place: str) -> str:
    if isinstance(document, str):
        return document
    if not document:  # templates may ask for a first message
        return ""
    try:
        return tokenizer.apply_chat_template(document, tokenize=False)
    except (TemplateError, TypeError) as error:  # the latter of templates that add a list of parts to text
        raise ValueError(f"{place}: the tokenizer's chat template does not take this conversation: {error}") from error
