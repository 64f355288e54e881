"""Which lists of layers hold what a run prunes, as the functions that look at weights take it."""

from collections.abc import Sequence

from torch import nn

from wanda_lightning.model.language_model import is_language_model
from wanda_lightning.model.stacks import stack_names


def lists_in(model: nn.Module, asked: str | Sequence[str] | None) -> str | Sequence[str] | None:
    """Name the lists of layers of a model without running it.

    Args:
        model: The model.
        asked: What the user said of them.

    Returns:
        Of a language model what was asked for: its decoder is found by rule. Of others the names of all lists.
    """
    if is_language_model(model) and (asked is None or isinstance(asked, str)):
        return asked
    named = (asked,) if isinstance(asked, str) else asked
    return tuple(named or stack_names(model))
