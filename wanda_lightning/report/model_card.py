"""The model card beside a saved model: what was done to it, with what data, and what came of it."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wanda_lightning.report.tables import Table, markdown_table

if TYPE_CHECKING:
    from wanda_lightning.report.pruning_report import PruningReport
    from wanda_lightning.report.shrinking import Shrinking

Training = Literal["none", "whole", "gradual", "adapter", "merged"]
"""What happened besides the pruning: nothing; the kept weights were trained, after it or while it went on step by step;
or low-rank adapters were, and lie beside the model or are merged into it."""

Kind = Literal["language model", "of transformers", "module"]
"""What was pruned: a language model of transformers, another model of theirs, or any other module."""

TRAINED: dict[Training, str] = {
    "whole": "The weights that were kept were then fine-tuned for {steps} steps; the zeros stayed zero.",
    "gradual": "It was pruned little by little while it was fine-tuned, for {steps} steps.",
    "adapter": "Low-rank adapters were then trained for {steps} steps. They are not part of this model but lie in "
    "`adapter/` beside its folder; figures under `fine-tuned` are with them.",
    "merged": "Low-rank adapters were then trained for {steps} steps and merged into the weights that are not zero: "
    "figures under `fine-tuned` are before the merge, those under `merged` are this model's.",
}


def model_card(
    report: "PruningReport",
    base: str | None = None,
    training: Training = "none",
    steps: int = 0,
    others: Sequence["PruningReport"] = (),
    shrinking: "Shrinking | None" = None,
    kind: Kind = "language model",
) -> str:
    """Write a model card in the hub's format.

    Args:
        report: What the pruning did, and the evaluations.
        base: Name or folder of the dense model, if it is known. Of a local path only its last
            part is shown.
        training: How the model was trained after the pruning.
        steps: Number of training steps.
        others: Reports of other matrices of the same model that were pruned in another way.
        shrinking: What was taken out of the model before, if anything was.
        kind: What loads it, and what it is for.

    Returns:
        Markdown with a YAML header.
    """
    made_from = report.model | ({"parameters": shrinking.parameters[0]} if shrinking else {})
    lines = _head(report.title, base, made_from, ["pruned", "sparse"], kind)
    if shrinking is not None:
        lines += [f"It was made smaller first: {shrinking.summary}", ""]
    for other in others:
        lines += [f"Other matrices were pruned in another way: {other.title}. {other.summary}", ""]
    loads = "safetensors.torch.load_model" if kind == "module" else "from_pretrained"
    stored = "The zeros are stored like other numbers, so the files are as large as without them"
    lines += [f"{report.summary} {stored}; `{loads}` loads them.", ""]
    if report.reconstruction:
        lines += [
            "What was kept of each layer was then trained on the calibration set to give what the layer gave in the "
            "dense model; the zeros stayed zero.",
            "",
        ]
    if training in TRAINED:
        lines += [TRAINED[training].format(steps=steps), ""]
    order = {"order": report.order} if report.order else {}
    return _with_tables(lines, report.overview(), {**order, **report.calibration, **report.environment})


def card_of_smaller(shrinking: "Shrinking", base: str | None = None, steps: int = 0) -> str:
    """Write the card of a model that was made smaller and has no zeros.

    Args:
        shrinking: What was taken out, and the evaluations.
        base: Name or folder of the dense model, if it is known.
        steps: Number of training steps afterwards.

    Returns:
        Markdown with a YAML header.
    """
    made_from = shrinking.model | {"parameters": shrinking.parameters[0]}
    lines = _head(shrinking.title, base, made_from, ["pruned"], "language model")
    lines += [f"{shrinking.summary} It is an ordinary model; `from_pretrained` loads it.", ""]
    if steps:
        lines += [f"It was then trained for {steps} steps.", ""]
    return _with_tables(lines, shrinking.overview(), {**shrinking.calibration, **shrinking.environment})


def _head(title: str, base: str | None, model: Mapping[str, Any], tags: list[str], kind: Kind) -> list[str]:
    """Return the YAML header, the title, and what the model was made from."""
    from huggingface_hub import ModelCardData

    on_the_hub = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not os.path.exists(base)
    data = ModelCardData(
        base_model=base if on_the_hub else None,
        library_name=None if kind == "module" else "transformers",
        pipeline_tag="text-generation" if kind == "language model" else None,
        tags=tags,
    )
    lines = ["---", data.to_yaml(), "---", "", f"# {title}", ""]
    if named := base or model.get("name"):
        size = f" ({model['parameters']:,} parameters)" if "parameters" in model else ""
        revision = f" at revision {model['revision']}" if model.get("revision") else ""
        lines += [f"Made from `{_without_folder(named)}`{revision}{size}.", ""]
    return lines


def _with_tables(lines: list[str], tables: Iterable[Table], settings: dict[str, Any]) -> str:
    """Write tables and settings behind the text."""
    for header, rows in tables:
        lines += [*markdown_table(header, rows), ""]
    values = [[key, _without_folder(value)] for key, value in settings.items()]
    return "\n".join([*lines, *markdown_table(["setting", ""], values, left=(0, 1))]) + "\n"


def _without_folder(value: Any) -> str:
    """Write a setting without the folders of the user's files, which are private."""
    parts = str(value).split(", ")
    return ", ".join(Path(part).name if os.path.exists(os.path.expanduser(part)) else part for part in parts)
