"""Where the model is in a folder that is named."""

from pathlib import Path


def model_folder(pretrained: str | Path) -> str:
    """Find the model that a name stands for: in the folder of a run it is in ``model/``.

    Args:
        pretrained: The folder of a run or of a model, a ``.gguf`` file, or a hub name.

    Returns:
        The folder of the saved model, if it is one of a run; else what was given.
    """
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
