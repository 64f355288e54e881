"""The dense model that a pruned one learns from, by its name."""

import logging
from collections.abc import Sequence
from typing import Any

from wanda_lightning.checkpoints.loading import load_config, load_model
from wanda_lightning.checkpoints.quiet import quiet_if_small
from wanda_lightning.engine.measured_sparsity import NOTABLE, measure_whole_model
from wanda_lightning.model.language_model import vocabulary_size
from wanda_lightning.training.distillation import Distillation, Teacher, check_vocabulary

log = logging.getLogger(__name__)

OF_ONE_MODEL = ("revision", "code_revision", "subfolder", "variant")
"""Arguments of ``from_pretrained`` that say where in its repository a model is, and nothing of another one."""


def check_teacher(distillation: Distillation | None, pretrained: str, **kwargs: Any) -> None:
    """Refuse a teacher that does not exist, or has another vocabulary; only configs are read.

    Args:
        distillation: Names the teacher; None where nothing is learnt from one.
        pretrained: Name of the model that is trained.
        kwargs: Passed on to ``from_pretrained``.

    Raises:
        ValueError: If one cannot learn from the other.
    """
    if distillation is None or distillation.teacher is None:  # the model itself
        return
    teacher, model = (vocabulary_size(load_config(name, **kwargs)) for name in (distillation.teacher, pretrained))
    if teacher is not None and model is not None:
        check_vocabulary(teacher, model)


def load_teacher(
    distillation: Distillation, pretrained: str, kept: Sequence[int] | None = None, **kwargs: Any
) -> Teacher:
    """Load the teacher.

    Args:
        distillation: Names it; if it names none, it is the model itself, dense.
        pretrained: Name of the model that is trained.
        kept: See :class:`wanda_lightning.training.distillation.Teacher`.
        kwargs: See :func:`wanda_lightning.load_model`; those of the model that is trained.

    Returns:
        The teacher.
    """
    teacher = distillation.teacher or pretrained
    if teacher != pretrained:
        kwargs = {name: value for name, value in kwargs.items() if name not in OF_ONE_MODEL}
    with quiet_if_small(teacher):
        dense = load_model(teacher, **kwargs)
    if (zeros := measure_whole_model(dense)) >= NOTABLE:  # as where training goes on from a pruned model
        log.warning(
            "the teacher %s was pruned itself, %.2f %% of its weights are zero: Distillation(teacher=...) names the "
            "dense model (--model.distillation.teacher on the command line)",
            teacher,
            100 * zeros,
        )
    return Teacher(dense, distillation, kept)
