"""Training a pruned model to predict as the dense one does.

Shapes: B batch, T tokens, V vocabulary, N predicted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanda_lightning.arguments import is_finite, number_not_below_0, plain_fields, positive_number
from wanda_lightning.training.hidden_states import hidden_state_error


@dataclass(frozen=True)
class Distillation:
    """Learn from the dense model's distribution of the next token (Hinton et al. 2015, arXiv:1503.02531, section 2).

    loss = alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross-entropy, each the mean
    over the predicted tokens. T^2 makes up for the gradients that a temperature shrinks. On top of it comes, if asked
    for, hidden_states * mean of |s - t|^2 / |t|^2, by how much hidden states s of the model differ from the teacher's;
    see :func:`wanda_lightning.training.hidden_states.hidden_state_error`.

    Args:
        alpha: Weight of the teacher, in [0, 1]; the text's own tokens weigh 1 - alpha.
        temperature: T, > 0. Higher values show more of what the teacher thinks of unlikely tokens.
        teacher: Name, folder or ``.gguf`` file of the dense model. Default: the one that is pruned, loaded once more.
        hidden_states: Weight of the hidden states' relative squared error, >= 0, at the layers that remain. Needs a
            teacher of the same hidden size, with the layers that the model had before some were taken out.

    Raises:
        ValueError: If a setting is out of range.
    """

    alpha: float = 0.5
    temperature: float = 2.0
    teacher: str | None = None
    hidden_states: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        if not is_finite(self.alpha) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be a number in [0, 1], got {self.alpha!r}")
        positive_number("temperature", self.temperature)
        number_not_below_0("hidden_states", self.hidden_states)
        if self.teacher is not None and not (isinstance(self.teacher, str) and self.teacher):
            raise ValueError(f"teacher must be the name, folder or .gguf file of a model, got {self.teacher!r:.100}")

    def loss(self, logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """Compute the loss on predictions.

        Args:
            logits_BTV: The student's predictions, shape (B, T, V); those at t are for the label at t + 1.
            teacher_BTV: The teacher's, same shape.
            labels_BT: Token ids, shape (B, T); -100 is not counted.

        Returns:
            The loss, a float32 scalar.

        Raises:
            ValueError: If the two have different vocabularies.
        """
        check_vocabulary(teacher_BTV.shape[-1], logits_BTV.shape[-1])
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


def check_vocabulary(teacher: int, model: int) -> None:
    """Refuse to compare predictions of another number of tokens.

    Args:
        teacher: How many tokens the teacher knows.
        model: How many the model does.

    Raises:
        ValueError: If they differ.
    """
    if teacher != model:
        raise ValueError(f"the teacher predicts {teacher} tokens, the model {model}: they need the same vocabulary")


class Teacher:
    """A frozen model in eval mode. It is no submodule, so checkpoints, optimizers and searches for a model pass it by.

    Args:
        model: A causal language model of transformers.
        distillation: What is learnt from it.
        kept: Which of its hidden states the student has: the numbers of the layers that remain, and at the end how many
            there were. Default: all.
    """

    def __init__(self, model: nn.Module, distillation: Distillation, kept: Sequence[int] | None = None) -> None:
        self.model, self.distillation, self.kept = model.eval().requires_grad_(False), distillation, kept

    def loss(self, student: nn.Module, inputs: dict[str, Tensor], labels_BT: Tensor) -> Tensor:
        """Compute a student's loss on a batch.

        Args:
            student: Gives what a model of transformers does.
            inputs: What it is called with.
            labels_BT: Token ids, shape (B, T); -100 is not counted.

        Returns:
            The loss, a float32 scalar.
        """
        weight = self.distillation.hidden_states
        asked = {"output_hidden_states": True} if weight else {}
        teacher, learnt = self(inputs, **asked), student(**inputs, **asked)
        loss = self.distillation.loss(learnt.logits, teacher.logits, labels_BT)
        if not weight:
            return loss
        mask_BT = inputs.get("attention_mask")
        real_BT = torch.ones_like(labels_BT, dtype=torch.bool) if mask_BT is None else mask_BT != 0
        return loss + weight * hidden_state_error(learnt.hidden_states, teacher.hidden_states, real_BT, self.kept)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], **asked: bool) -> Any:
        """Return what the model gives, on the device of the inputs."""
        device = inputs["input_ids"].device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return self.model(**inputs, **asked, use_cache=False)

    def __deepcopy__(self, memo: Any) -> "Teacher":
        """Share the teacher: weight averaging copies the module that holds it, and it never changes."""
        return self
