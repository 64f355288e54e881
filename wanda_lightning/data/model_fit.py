"""The tokenizer and the window length that fit the model, where nothing else is asked for."""

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wanda_lightning.checkpoints.loading import load_tokenizer
from wanda_lightning.model.language_model import max_sequence_length, vocabulary_size

DEFAULT_SEQUENCE_LENGTH = 2048


class ModelFit:
    """Finds a tokenizer and a length for windows."""

    def __init__(self) -> None:
        self._loaded: tuple[str, PreTrainedTokenizerBase] | None = None

    def tokenizer(
        self, given: str | PreTrainedTokenizerBase | None, module: LightningModule | None
    ) -> PreTrainedTokenizerBase:
        """Load the tokenizer that was given, else that of the module; the last one is kept.

        Args:
            given: A name, a folder or a tokenizer.
            module: The module with the model.

        Returns:
            The tokenizer.

        Raises:
            ValueError: If there is none.
        """
        wanted = self.wanted_tokenizer(given, module)
        if not isinstance(wanted, str):
            return wanted
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = wanted, load_tokenizer(wanted)
        return self._loaded[1]

    @staticmethod
    def wanted_tokenizer(given: str | PreTrainedTokenizerBase | None, module: LightningModule | None) -> Any:
        """Name the tokenizer without loading it; see :meth:`tokenizer`."""
        wanted = given if given is not None else getattr(module, "tokenizer", None)
        if wanted is None and module is not None:
            wanted = module.hparams.get("pretrained")
        if wanted is None:
            raise ValueError(
                "no tokenizer: give TextDataModule(tokenizer=...) a name, a folder or a tokenizer, or use it with a "
                "LightningModule that has an attribute tokenizer or a hyperparameter pretrained"
            )
        return wanted

    def length(self, asked: int | None, tokenizer: PreTrainedTokenizerBase, module: LightningModule | None) -> int:
        """Return the number of tokens in a window.

        Args:
            asked: The number asked for; None for the default, or the model's limit where that is lower.
            tokenizer: The tokenizer.
            module: The module with the model.

        Returns:
            The number.

        Raises:
            ValueError: If more are asked for than the model takes.
        """
        limit = self.check_length(asked, module)
        # A tokenizer's own limit is often wrong or huge, so it only lowers the default.
        return asked or min(DEFAULT_SEQUENCE_LENGTH, limit or tokenizer.model_max_length)

    @staticmethod
    def check_length(asked: int | None, module: LightningModule | None) -> int | None:
        """Return the model's limit, None where it is not known; refuse windows that are longer."""
        limit = next(_said(max_sequence_length, module), None)  # of the first model
        if asked is not None and limit is not None and asked > limit:
            raise ValueError(
                f"sequence_length must be at most {limit}, the model's max_position_embeddings, got {asked}"
            )
        return limit

    @staticmethod
    def check_ids(ids: Tensor, module: LightningModule | None) -> None:
        """Refuse tokens that the model does not know, as another model's tokenizer gives them."""
        known = max(_said(vocabulary_size, module), default=None)  # a teacher beside the model may know fewer
        if known is not None and int(ids.max()) >= known:
            raise ValueError(
                f"the tokenizer gives token {int(ids.max())}, and the model knows those below {known} only: take the "
                "model's own tokenizer"
            )


def _said(what: Callable[[Any], int | None], module: LightningModule | None) -> Iterator[int]:
    """Yield what the configs of a module's models say, whatever it calls them."""
    parts = () if module is None else module.modules()
    yield from filter(None, (what(part.config) for part in parts if hasattr(part, "config")))
