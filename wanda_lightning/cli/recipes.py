"""``wanda-lightning recipes``: the recipes that come with the package, found by name from any folder."""

import argparse
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from wanda_lightning.cli.commands import parser_settings

FOLDER = Path(str(files("wanda_lightning"))) / "recipes"


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
    if Path(recipe).is_file():
        return Path(recipe)
    path = Path(recipe)
    packaged = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent.name in ("", "recipes") and packaged.is_file():
        return packaged
    raise ValueError(f"there is no file {recipe!r}, and the recipes of the package are {', '.join(recipes())}")


def with_recipes_found(arguments: Sequence[str]) -> list[str]:
    """Replace the names of packaged recipes after ``-c`` and ``--config`` by their files."""
    found = list(arguments)
    for number, argument in enumerate(arguments):
        if argument.startswith("--config=") and "{" not in argument:
            found[number] = f"--config={find(argument.removeprefix('--config='))}"
        elif number and arguments[number - 1] in ("-c", "--config") and "{" not in argument:
            found[number] = str(find(argument))
    return found


def main(arguments: Sequence[str]) -> None:
    """Run ``wanda-lightning recipes``."""
    parser = argparse.ArgumentParser(**parser_settings("recipes"))
    commands = parser.add_subparsers(dest="command")
    show = commands.add_parser("show", help="print a recipe")
    copy = commands.add_parser("copy", help="copy a recipe to a file of your own")
    for command in (show, copy):
        command.add_argument("name")
    copy.add_argument("target", nargs="?", type=Path, help="file (default: the recipe's name, in this folder)")
    options = parser.parse_args(arguments)
    if options.command is None:
        width = max(map(len, recipes()))
        print("\n".join(f"{name:{width}}  {what}" for name, what in recipes().items()))
    elif options.command == "show":
        print(find(options.name).read_text(encoding="utf-8"), end="")
    else:
        source = find(options.name)
        target = options.target or Path(source.name)
        target = target / source.name if target.is_dir() else target
        if target.exists():
            raise ValueError(f"{target} exists already: name another file")
        shutil.copyfile(source, target)
        print(f"{source.stem} is in {target}: wanda-lightning ... -c {target}")
