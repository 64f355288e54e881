"""The model card beside a saved model: what was done to it, with what data, and what came of it."""

from typing import TYPE_CHECKING

from wanda_lightning.tables import markdown_table

if TYPE_CHECKING:
    from wanda_lightning.report import PruningReport


def model_card(report: "PruningReport", base: str | None = None) -> str:
    """Write a model card in the hub's format.

    Args:
        report: What the pruning did, and the evaluations.
        base: Name or folder of the dense model, if it is known.

    Returns:
        Markdown with a YAML header.
    """
    lines = ["---", "library_name: transformers", "tags: [pruned, sparse]", "---", "", f"# {report.title}", ""]
    if base is not None:
        lines += [f"Made from `{base}`.", ""]
    lines += [
        f"{report.summary} The zeros are stored like other numbers, so the files are as large as those of the dense "
        "model; `from_pretrained` loads them.",
        "",
    ]
    for header, rows in report.overview():
        lines += [*markdown_table(header, rows), ""]
    settings = {**report.calibration, **report.environment}
    lines += markdown_table(["setting", ""], [[key, str(value)] for key, value in settings.items()], left=(0, 1))
    return "\n".join(lines) + "\n"
