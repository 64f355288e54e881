"""What a run evaluates on: one text or several, each under its name.

Shapes: T tokens in a window, N windows.
"""

import os.path
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wanda_lightning.data.source import Source
from wanda_lightning.data.sources import open_source

Evaluation = dict[str, str] | list[str] | str | None


@dataclass(frozen=True)
class EvaluationSet:
    """A text to evaluate on.

    Attributes:
        name: Its name in the metrics; empty if it is the only set.
        location: The source as the user named it.
        source: The text; None where it is the evaluation part of the source of calibration.
    """

    name: str
    location: str
    source: Source | None


def evaluation_sets(
    evaluation: Evaluation, calibration_source: str, text_field: str, evaluation_split: str
) -> list[EvaluationSet]:
    """Find the texts to evaluate on. Nothing is read yet.

    Args:
        evaluation: A source, several, or several by name. None is the evaluation part of ``calibration_source``.
        calibration_source: The source of calibration and training. Where it is among the others, its own evaluation
            part is meant.
        text_field: The field of a JSON line, or the column of a data set, that holds the text or conversations.
        evaluation_split: Split of a data set.

    Returns:
        The sets, in the order given.

    Raises:
        ValueError: If two have one name, a file does not exist, or something else than a source is named.
    """
    locations = [*evaluation.values()] if isinstance(evaluation, dict) else evaluation or ""
    if not isinstance(locations, str | list | tuple) or not all(isinstance(each, str) for each in locations):
        raise ValueError(f"evaluation must be a source, a list of them, or a dict of them by name, got {evaluation!r}")
    if evaluation is None or isinstance(evaluation, str):
        named = {"": calibration_source if evaluation is None else evaluation}
    elif isinstance(evaluation, dict):
        named = evaluation
    else:
        named = {_short(location): location for location in evaluation}
        if len(named) < len(evaluation):
            raise ValueError(
                f"two of the evaluation sets have one name, give names: {{name: source}}; got {evaluation}"
            )
    if not named:
        raise ValueError("evaluation names no source; leave it out for the evaluation part of source")
    return [
        EvaluationSet(
            name,
            location,
            # One file under two spellings must not end up whole on both sides.
            None
            if _place(location) == _place(calibration_source)
            else open_source(location, whole=True, text_field=text_field, evaluation_split=evaluation_split),
        )
        for name, location in named.items()
    ]


def evaluation_rows(windows_NT: Tensor, rest: Tensor | None = None, processes: int = 1) -> list[dict[str, Tensor]]:
    """Make the rows of a dataloader; their number can be divided by that of the processes.

    A sampler that splits rows over processes repeats some where they do not come out even, and every process must do
    as many batches, or they wait for each other forever. So rows are added that hold nothing to predict: their
    ``attention_mask`` leaves one token.

    Args:
        windows_NT: Windows, shape (N, T).
        rest: A last, shorter window, shape (fewer than T,); padded on the right.
        processes: Number of processes that share the rows.

    Returns:
        Rows of ``input_ids`` (T,) and, where any of them is padded, ``attention_mask`` (T,).
    """
    rows = [{"input_ids": window_T} for window_T in windows_NT]
    lengths = [windows_NT.shape[1]] * len(rows)
    if rest is not None:
        padding = torch.zeros(windows_NT.shape[1] - len(rest), dtype=rest.dtype, device=rest.device)
        rows.append({"input_ids": torch.cat([rest, padding])})
        lengths.append(len(rest))
    for _ in range(-len(rows) % processes):
        rows.append(rows[0])
        lengths.append(1)
    if min(lengths) == max(lengths):
        return rows
    positions_T = torch.arange(windows_NT.shape[1], device=windows_NT.device)
    return [row | {"attention_mask": (positions_T < length).long()} for row, length in zip(rows, lengths, strict=True)]


def _place(location: str) -> str:
    return os.path.realpath(os.path.expanduser(location))


def _short(location: str) -> str:
    """Name a source: a file by its stem, a data set by the last part of its name."""
    return Path(location).stem if Path(location).suffix else location.rstrip("/").rpartition("/")[2]
