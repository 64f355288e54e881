"""How far the hidden states of a smaller model are from those of the dense model that it was made of.

Shapes: B batch, T tokens, D hidden size, N real tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_state_error(
    student_BTD: Sequence[Tensor], teacher_BTD: Sequence[Tensor], real_BT: Tensor, kept: Sequence[int] | None = None
) -> Tensor:
    """Measure the relative squared error of hidden states (Muralidharan et al. 2024, Minitron, arXiv:2407.14679).

    error = mean of |s - t|^2 / |t|^2 over tokens and layers, s and t being what enters a layer of the student and the
    same layer of the teacher, or what the model's head reads. So a student is asked to give to each layer what this
    layer got before others went. Each token's error is relative to its own target, which makes the error free of scale:
    neither do layers count more in which hidden states are large, nor tokens (Sun et al. 2024, arXiv:2402.17762).

    Args:
        student_BTD: What enters each layer, and the last hidden state, each of shape (B, T, D); as transformers'
            ``output_hidden_states`` gives them.
        teacher_BTD: The teacher's; there may be more of them.
        real_BT: True = to be counted, shape (B, T).
        kept: For each of the student's, which of the teacher's it is compared with: the numbers of the layers that
            remain, and at the end the number of the teacher's layers. Default: all.

    Returns:
        The error, a float32 scalar, 0 where they are the same.

    Raises:
        ValueError: If they cannot be compared.
    """
    kept = range(len(student_BTD)) if kept is None else kept
    if len(kept) != len(student_BTD) or kept[-1] + 1 != len(teacher_BTD):
        raise ValueError(
            f"the teacher has {len(teacher_BTD) - 1} layers, the model {len(student_BTD) - 1}, made of {kept[-1]}: "
            "hidden states can only be compared with those of the model that layers were taken out of in this run; "
            "take that as the teacher, or leave out hidden_states"
        )
    errors = []
    for student, number in zip(student_BTD, kept, strict=True):
        teacher = teacher_BTD[number]
        if student.shape != teacher.shape:
            raise ValueError(
                f"the teacher's hidden size is {teacher.shape[-1]}, the model's {student.shape[-1]}: hidden states can "
                "only be compared if they are the same; leave out hidden_states"
            )
        student_ND, teacher_ND = student[real_BT].float(), teacher[real_BT].float()
        energy_N = teacher_ND.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        errors.append(((student_ND - teacher_ND).square().sum(-1) / energy_N).mean())
    return torch.stack([error.to(errors[-1].device) for error in errors]).mean()
