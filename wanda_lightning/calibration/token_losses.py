"""What a language model loses on calibration text. Shapes: B batch, T tokens, V vocabulary, N predicted tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from wanda_lightning.calibration.batches import Batch, model_inputs
from wanda_lightning.model.language_model import is_language_model, uncompiled
from wanda_lightning.model.next_tokens import NOT_PREDICTED, inputs_and_labels
from wanda_lightning.model.offload import device_of

NOTHING_PREDICTED = (
    "the calibration sequences that losses are measured on predict nothing: they need at least 2 tokens each"
)


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model gives logits of the next tokens: a language model with its head, and no classifier."""
    return is_language_model(model) and cast(Any, uncompiled(model)).get_output_embeddings() is not None


def token_losses(model: nn.Module, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """Run the model over sequences one by one, as logits are large, and yield the cross-entropies of their next tokens.

    Args:
        model: A causal language model of transformers.
        batches: See :func:`wanda_lightning.calibration.walk.walk`.

    Yields:
        For each sequence the losses of its predicted tokens, in nats, float32, shape (N,).
    """
    device = device_of(cast(Any, model).get_input_embeddings())
    for batch in batches:
        inputs = model_inputs(batch, model)
        for row in range(len(inputs["input_ids"])):
            one, labels_1T = inputs_and_labels({name: each[row : row + 1].to(device) for name, each in inputs.items()})
            logits_TV = model(**one, use_cache=False).logits[0, :-1].float()
            labels_T = labels_1T[0, 1:].to(logits_TV.device)
            losses_T = F.cross_entropy(logits_TV, labels_T, ignore_index=NOT_PREDICTED, reduction="none")
            yield losses_T[labels_T != NOT_PREDICTED]
