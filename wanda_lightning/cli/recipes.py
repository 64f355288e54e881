"""``wanda-lightning recipes``: the recipes that come with the package, found by name from any folder."""

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from wanda_lightning.cli.commands import run_function

FOLDER = Path(str(files("wanda_lightning"))) / "recipes"
Action = Literal["list", "show", "copy"]


def recipes() -> dict[str, str]:
    """Return what each packaged recipe does, the first line of its header, by its name without the suffix."""
    return {
        file.stem: file.read_text(encoding="utf-8").partition("\n")[0][2:] for file in sorted(FOLDER.glob("*.yaml"))
    }


def find(recipe: str) -> Path:
    """Find a recipe.

    Args:
        recipe: A file, or the name of a packaged recipe, also written as in a clone: ``wanda``, ``recipes/wanda.yaml``.

    Returns:
        The file.

    Raises:
        ValueError: If there is no such file, and no packaged recipe of that name.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent.name in ("", "recipes") and packaged.is_file():
        return packaged
    raise ValueError(f"there is no file {recipe!r}, and the recipes of the package are {', '.join(recipes())}")


def is_inline(recipe: str) -> bool:
    """Whether this is no name but the settings themselves, as ``-c '{trainer: {max_steps: 3}}'``."""
    return "{" in recipe


def settings_of(recipe: str) -> dict[str, Any]:
    """Read a recipe.

    Args:
        recipe: See :func:`find`; or the settings themselves.

    Returns:
        Its settings.

    Raises:
        ValueError: If there is no such recipe, or it cannot be read.
    """
    name = recipe if is_inline(recipe) else str(find(recipe))
    try:
        settings = yaml.safe_load(recipe if is_inline(recipe) else Path(name).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name} is no recipe: its settings need names, as in `trainer: ...`, got {settings!s:.60}")
    return settings


def list_show_or_copy(action: Action = "list", name: str | None = None, target: Path | None = None) -> None:
    """List the recipes, print one, or copy it to a file of your own.

    Args:
        action: What to do.
        name: The recipe to show or to copy.
        target: File or folder of the copy. Default: the recipe's name, in this folder.

    Raises:
        ValueError: If there is no such recipe, none was named, or the target exists.
    """
    if action == "list":
        width = max(map(len, recipes()))
        print("\n".join(f"{name:{width}}  {what}" for name, what in recipes().items()))
        return
    if name is None:
        raise ValueError(f"which recipe? `wanda-lightning recipes {action} NAME`, one of {', '.join(recipes())}")
    source = find(name)
    if action == "show":
        print(source.read_text(encoding="utf-8"), end="")
    else:
        _copy(source, target or Path(source.name))


def main(arguments: list[str]) -> None:
    """Run ``wanda-lightning recipes``."""
    run_function(
        "recipes",
        list_show_or_copy,
        arguments,
        action={"nargs": "?", "type": Action, "default": "list", "help": "What to do."},
        name={"nargs": "?", "type": str, "help": "The recipe to show or to copy."},
        target={"nargs": "?", "type": Path, "help": "File or folder of the copy, by default in this folder."},
    )


def _copy(source: Path, target: Path) -> None:
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise ValueError(f"{target} exists already: name another file")
    shutil.copyfile(source, target)
    print(f"{source.stem} is in {target}: wanda-lightning ... -c {target}")
