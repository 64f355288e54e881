"""Training a pruned model to predict as the dense one does.

Shapes: B batch, T tokens, V vocabulary, N predicted tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Distillation:
    """Learn from the dense model's distribution of the next token (Hinton et al. 2015, arXiv:1503.02531, section 2).

    loss = alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross-entropy, each the mean
    over the predicted tokens. T^2 makes up for the gradients that a temperature shrinks.

    Args:
        alpha: Weight of the teacher, in [0, 1]; the text's own tokens weigh 1 - alpha.
        temperature: T, > 0. Higher values show more of what the teacher thinks of unlikely tokens.
        teacher: Name, folder or ``.gguf`` file of the dense model. Default: the one that is pruned, loaded once more.

    Raises:
        ValueError: If a setting is out of range.
    """

    alpha: float = 0.5
    temperature: float = 2.0
    teacher: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {self.temperature}")

    def loss(self, logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits_BTV: The student's predictions, shape (B, T, V); those at t are for the label at t + 1.
            teacher_BTV: The teacher's, same shape.
            labels_BT: Token ids, shape (B, T); -100 is not counted.

        Returns:
            The loss, a float32 scalar.

        Raises:
            ValueError: If the two have different vocabularies.
        """
        if logits_BTV.shape != teacher_BTV.shape:
            raise ValueError(
                f"the teacher predicts {teacher_BTV.shape[-1]} tokens, the model {logits_BTV.shape[-1]}: they need the "
                "same vocabulary"
            )
        predicted_BT = labels_BT[:, 1:] != -100
        student_NV = logits_BTV[:, :-1][predicted_BT].float()
        teacher_NV = teacher_BTV[:, :-1][predicted_BT].float()
        divergence = F.kl_div(
            F.log_softmax(student_NV / self.temperature, dim=-1),
            F.log_softmax(teacher_NV / self.temperature, dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        cross_entropy = F.cross_entropy(student_NV, labels_BT[:, 1:][predicted_BT])
        return self.alpha * self.temperature**2 * divergence + (1 - self.alpha) * cross_entropy


class Teacher:
    """A frozen model in eval mode. It is no submodule, so checkpoints, optimizers and searches for a model pass it by.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the predictions, shape (B, T, V), on the device of the inputs."""
        device = inputs["input_ids"].device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return self.model(**inputs, use_cache=False).logits

    def __deepcopy__(self, memo: Any) -> "Teacher":
        """Share the teacher: weight averaging copies the module that holds it, and it never changes."""
        return self
