"""Where the model is in a folder that is named, and whether one may go there."""

import json
from os import PathLike
from pathlib import Path

OF_A_MODEL = {".bin", ".jinja", ".json", ".md", ".model", ".py", ".safetensors", ".spm", ".tiktoken", ".txt"}
"""Ends of the names of files that are saved with a model: weights, configs, tokenizers, a card, code."""
TEMPLATES = "additional_chat_templates"
"""The one folder that a tokenizer saves."""


def model_folder(pretrained: str | Path) -> str:
    """Find the model that a name stands for: in the folder of a run it is in ``model/``.

    Args:
        pretrained: The folder of a run or of a model, a ``.gguf`` file, or a hub name.

    Returns:
        The folder of the saved model, if it is one of a run; else what was given.

    Raises:
        ValueError: If it is neither text nor a path, but, for example, a model.
    """
    if not isinstance(pretrained, str | PathLike):
        raise ValueError(f"a model's name or folder is needed, got a {type(pretrained).__name__}")
    run = Path(pretrained).expanduser()
    of_run = (run / "model/config.json").is_file() and not (run / "config.json").exists()
    return str(run / "model") if of_run else str(pretrained)


def check_place(pretrained: str | Path) -> None:
    """Refuse what is neither here nor a name that a hub could know.

    Args:
        pretrained: The folder of a run or of a model, a ``.gguf`` file, or a hub name.

    Raises:
        ValueError: If there is no such file or folder, or no model in it.
    """
    path = Path(model_folder(pretrained)).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no such GGUF file: {pretrained}")
    elif str(pretrained).startswith((".", "/", "~")) and not path.exists():
        raise ValueError(f"there is no folder {str(pretrained)!r}")
    elif path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{pretrained} is no model folder: it holds no config.json (a file must end in .gguf)")


def place_for(folder: str | Path) -> Path:
    """Return where a model goes; refuse a place that holds something else, which would be deleted.

    Args:
        folder: The place.

    Returns:
        Its whole path.

    Raises:
        ValueError: If a file is there, a git repository, or a folder with other things than a model.
    """
    folder = Path(folder).expanduser().resolve()
    if lost := _beside_a_model(folder):
        raise ValueError(
            f"{folder} holds {lost}, and would be replaced as a whole: name a new folder, an empty one, or an older "
            "model's"
        )
    return folder


def _beside_a_model(folder: Path) -> str | None:
    """Say what a place holds that is not part of a saved model; None if there is nothing."""
    if (folder / ".git").exists():
        return "a git repository"
    found = [*folder.glob("*")]
    if folder.is_file() or (found and not _is_model(folder)):
        return "no model"
    shown = [path for path in found if not path.name.startswith(".") and path.name != TEMPLATES]
    others = sorted(path.name for path in shown if path.suffix not in OF_A_MODEL)
    return f"{', '.join(others[:3])} beside a model" if others else None


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model; other programs have a ``config.json``, too."""
    if (folder / "model.safetensors").is_file():
        return True
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
