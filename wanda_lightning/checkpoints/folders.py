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
