"""What is wrong with a command line, as far as it shows before Lightning is imported, which takes seconds."""

from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from typing import Any

from wanda_lightning.checkpoints.folders import check_place
from wanda_lightning.cli.recipes import is_inline, settings_of
from wanda_lightning.cli.short_options import FLAGS, LONG, OF_CALLBACK, closest

OF_RUNS = {
    "sweep": ("--methods", "--sparsities", "--patterns", "--allocations"),
    "search": (
        *("--max_perplexity_increase", "--max_bytes", "--metric", "--max_drop", "--max_rise", "--step"),
        "--held_out_windows",
    ),
}
"""The options that one sub-command has and no other."""
PLAIN = (
    *LONG,
    *OF_CALLBACK,
    *FLAGS,
    *("-c", "--config", "--trainer", "--seed_everything", "--ckpt_path", "--weights_only", "--verbose"),
    *("--evaluate", "--save"),
    *(option for options in OF_RUNS.values() for option in options),
)
"""The options without a dot in their names; the others, such as ``--data.source``, are those of classes."""
NO_MODEL = "no model was given: name it first behind the command, a hub name, a folder or a .gguf file"


def refuse_at_once(arguments: Sequence[str]) -> None:
    """Refuse a recipe or a model that is not there, a recipe for another command, and mistyped options.

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
    recipes = {recipe: settings_of(recipe) for recipe in given.config if not is_inline(recipe)}
    for recipe, settings in recipes.items():
        for command, options in OF_RUNS.items():
            if arguments[0] != command and any(f"--{name}" in options for name in settings):
                raise ValueError(f"{recipe} is a recipe for `wanda-lightning {command}`, not for {arguments[0]}")
    if arguments[0] == "sweep" and "--overwrite" in others:
        raise ValueError("sweep has no --overwrite: it keeps the runs of one model side by side; name a new --output")
    for name in (word.partition("=")[0] for word in others):
        plain = name.startswith("--") and "." not in name and not name.endswith("+") and name not in PLAIN
        if plain and (meant := closest(name, PLAIN)):
            raise ValueError(f"there is no option {name}\n  did you mean {meant}?")
    # Only what is certain: options that speak of a model may name one, and help needs none.
    words = [*others, *filter(is_inline, given.config)]
    open_to_doubt = any(word in text for text in words for word in ("model", "help", "print_", "-h"))
    if not open_to_doubt and not any(map(_names_a_model, recipes.values())):
        raise ValueError(NO_MODEL)
    values = {name: value for name, _, value in (word.partition("=") for word in others)}
    ours = not any(map(is_inline, given.config)) and all(map(_is_ours, recipes.values()))
    if ours and values.keys().isdisjoint({"--model", "--model.class_path"}) and values.get("--model.pretrained"):
        check_place(values["--model.pretrained"])


def _names_a_model(settings: dict[str, Any]) -> bool:
    return "pretrained" in str(settings) or not _is_ours(settings)  # ours takes it as an argument


def _is_ours(settings: dict[str, Any]) -> bool:
    """Whether a recipe leaves it at our module, to which a name means a language model."""
    model = settings.get("model") or {}
    return isinstance(model, dict) and model.get("class_path", "CausalLM").rpartition(".")[2] == "CausalLM"
