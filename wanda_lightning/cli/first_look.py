"""What is wrong with a command line, as far as it shows before Lightning is imported, which takes seconds."""

from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from wanda_lightning.cli.recipes import find, is_inline

NO_MODEL = "no model was given: add --model.pretrained MODEL, a hub name, a folder or a .gguf file"


def refuse_at_once(arguments: Sequence[str]) -> None:
    """Refuse a recipe that is not there or none at all, and a run without a model.

    Args:
        arguments: A sub-command of LightningCLI and its options.

    Raises:
        ValueError: Names what is missing or wrong.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    try:
        given, others = parser.parse_known_args(arguments)
    except ArgumentError as error:
        raise ValueError(
            f"-c needs the name of a recipe, see `wanda-lightning recipes`, or a file ({error})"
        ) from error
    recipes = [_settings(find(recipe)) for recipe in given.config if not is_inline(recipe)]
    # Only what is certain: options that speak of a model may name one, and help needs none.
    words = [*others, *filter(is_inline, given.config)]
    open_to_doubt = any(word in text for text in words for word in ("model", "help", "print_", "-h"))
    if not open_to_doubt and not any(map(_names_a_model, recipes)):
        raise ValueError(NO_MODEL)


def _names_a_model(settings: dict[str, Any]) -> bool:
    model = settings.get("model") or {}
    if not isinstance(model, dict) or "pretrained" in str(settings):
        return True
    return model.get("class_path", "CausalLM").rpartition(".")[2] != "CausalLM"  # ours takes it as an argument


def _settings(recipe: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{recipe} is no recipe: its settings need names, as in `trainer: ...`, got {settings!s:.60}")
    return settings
