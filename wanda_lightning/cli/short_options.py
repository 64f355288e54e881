"""``prune MODEL --method wanda --sparsity 0.6``: short options, written out as the long ones that LightningCLI takes.

``prune MODEL --output DIR`` becomes ``prune -c wanda --model.pretrained MODEL --trainer.default_root_dir DIR``. Those
of the pruning callback, which may stand anywhere in the list of callbacks, become that list.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from wanda_lightning.arguments import Dtype, is_fraction, meant_sparsity, one_of
from wanda_lightning.cli.recipes import settings_of

METHODS = {
    "magnitude": "MagnitudePruning",
    "wanda": "WandaPruning",
    "sparsegpt": "SparseGPTPruning",
    "ablate": "AblatePruning",
    "admm": "ADMMPruning",
    "ria": "RIAPruning",
}
LONG = {
    "MODEL": "--model.pretrained",
    "--model": "--model.pretrained",
    "--data": "--data.source",
    "--eval": "--data.evaluation",
    "--output": "--trainer.default_root_dir",
    "--num_samples": "--data.num_samples",
    "--sequence_length": "--data.sequence_length",
    "--dtype": "--model.dtype",
    "--max_steps": "--trainer.max_steps",
    "--push_to_hub": "--trainer.push_to_hub",
    "--trust_remote_code": "--model.trust_remote_code",
}
OF_CALLBACK = ("--method", "--sparsity", "--pattern", "--prompt")
OF_SHAPES = ("WidthPruning", "DepthPruning")  # callbacks that have none of these options
# The options that no value follows.
FLAGS = (
    "-h", "--help", "--help-all", "--print_config", "--overwrite", "--no_overwrite", "-v", "--details", "-q", "--quiet",
)  # fmt: skip
RECIPES = {"prune": "wanda", "fit": "wanda_finetune", "sweep": "sweep", "search": "search"}  # where no other is named
INSTEAD = {
    "sweep": ": it takes --methods, --sparsities and --patterns, with a list each",
    "search": ": it finds the sparsity, see --max_perplexity_increase",
}


def written_out(arguments: Sequence[str]) -> list[str]:
    """Write out the short options of a command line.

    Args:
        arguments: A sub-command of LightningCLI and its options.

    Returns:
        The same with long options only. Where there were short ones, recipes come first: options override them.

    Raises:
        ValueError: If a short option lacks its value, or has one that cannot be used.
    """
    command, *rest = arguments
    short, recipes, others = _parted(rest)
    if not short:
        return [*arguments]
    _check(command, short)
    if not recipes and command in RECIPES:
        recipes = [RECIPES[command]]
        if command in ("prune", "fit"):
            folder = recipes[0].replace("wanda", short.get("--method", "wanda").lower())
            short.setdefault("--output", f"results/{folder}")
    written = [f"{LONG[option]}={value}" for option, value in short.items() if option in LONG]
    return [command, *(f"--config={recipe}" for recipe in recipes), *written, *_callbacks(short, recipes), *others]


def closest(option: str, known: Iterable[str]) -> str | None:
    """Find the option that was meant: the one that is spelled alike, or one of another part whose end is."""
    names = list(dict.fromkeys(known))
    ends = {name.lstrip("-").rpartition(".")[2]: name for name in reversed(names)}
    if alike := get_close_matches(option, names, 1, 0.8):
        return alike[0]
    end = get_close_matches(option.lstrip("-").rpartition(".")[2], ends, 1, 0.75)
    return ends[end[0]] if end else None


def no_method(option: str, given: str) -> str:
    """Say that this is the name of no method, and which was meant."""
    meant = closest(given.lower(), METHODS)
    return f"{option} must be one of {', '.join(METHODS)}, got {given!r}" + (
        f"; did you mean {meant}?" if meant else ""
    )


def _parted(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Part short options and their values, recipes, and all others, which stay as they are."""
    short: dict[str, Any] = {}
    recipes: list[str] = []
    others: list[str] = []
    for option, value, words in _options(arguments):
        if option in ("-c", "--config") and value:
            recipes.append(value)
        elif option not in (*LONG, *OF_CALLBACK) or (option in ("--model", "--data") and _is_for_lightning(value)):
            others += words
        elif not value:
            raise ValueError(f"{option} needs a value")
        elif option == "MODEL" and option in short:
            raise ValueError(f"one model at a time, got {short[option]!r} and {value!r}")
        elif option == "--prompt":
            short[option] = [*short.get(option, []), value]
        else:
            short[option] = value
    return short, recipes, others


def _options(arguments: Iterable[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield each option with its value, empty if it has none, and the words for both; a word by itself is a MODEL."""
    left = iter(arguments)
    for word in left:
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            yield "MODEL", word, [word]
        elif word.startswith("-c") and word != "-c":
            yield "-c", word.removeprefix("-c").removeprefix("="), [word]
        elif equals or option in FLAGS:
            yield option, value, [word]
        else:
            following = [*islice(left, 1)]
            yield option, "".join(following), [word, *following]


def _is_for_lightning(value: str) -> bool:
    """Whether ``--model`` or ``--data`` is followed by a class or by settings, as LightningCLI has it."""
    if not value or "{" in value or value.endswith((".yaml", ".yml")):
        return True
    parts = value.split(".")
    return all(map(str.isidentifier, parts)) and parts[-1][0].isupper() and not Path(value).exists()


def _check(command: str, short: dict[str, Any]) -> None:
    """Refuse options that the command does not have, and values that are certainly wrong."""
    allowed = {"prune": OF_CALLBACK, "fit": OF_CALLBACK, "search": ("--method",)}.get(command, ())
    if own := [option for option in OF_CALLBACK if option in short and option not in allowed]:
        hint = "" if own[0] == "--prompt" else INSTEAD.get(command, "")
        raise ValueError(f"{command} has no {own[0]}{hint}")
    if short.get("--method", "wanda").lower() not in METHODS:
        raise ValueError(no_method("--method", short["--method"]))
    sparsity = short.get("--sparsity", "0")
    if not is_fraction(_number(sparsity)):
        hint = "; an N:M pattern is --pattern" if ":" in sparsity else meant_sparsity(sparsity)
        raise ValueError(f"--sparsity must be a number in [0, 1), got {sparsity!r}{hint}")
    one_of("--dtype", short.get("--dtype", "auto"), Dtype)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _callbacks(short: dict[str, Any], recipes: Sequence[str]) -> list[str]:
    """Return the option that sets the callbacks: those of the recipes, the first that prunes as the short ones say."""
    callbacks: list[dict[str, Any]] = []
    for recipe in recipes:
        trainer = settings_of(recipe).get("trainer")
        found = trainer.get("callbacks") if isinstance(trainer, dict) else None
        callbacks = [_as_dict(each) for each in (found if isinstance(found, list) else [found])] if found else callbacks
    kinds = [each["class_path"] for each in callbacks]
    zeros = [kind.endswith(("Pruning", "PruningCallback")) and not kind.endswith(OF_SHAPES) for kind in kinds]
    pruning = [each for each, makes_zeros in zip(callbacks, zeros, strict=True) if makes_zeros]
    asked = {option.removeprefix("--"): short[option] for option in OF_CALLBACK if option in short}
    if asked and not pruning:
        pruning = [_as_dict(METHODS["wanda"])]
        callbacks += pruning
    moved = False
    for settings in (each["init_args"] for each in pruning if "prompt" in asked):
        settings["prompts"] = asked["prompt"]
    for settings in (each["init_args"] for each in pruning):
        if "--output" in short and settings.get("output_dir"):
            settings["output_dir"], moved = short["--output"], True
    if "method" in asked:
        pruning[0]["class_path"] = METHODS[asked["method"].lower()]
    if "sparsity" in asked or "pattern" in asked:  # either ends what the recipe says of the other
        sparsity = float(asked["sparsity"]) if "sparsity" in asked else None
        pruning[0]["init_args"] |= {"sparsity": sparsity, "pattern": asked.get("pattern", "unstructured")}
    return [f"--trainer.callbacks={json.dumps(callbacks)}"] if asked or moved else []


def _as_dict(callback: Any) -> dict[str, Any]:
    """Write a callback of a recipe, which may be the name of a class alone, as a class and its arguments."""
    if isinstance(callback, str):
        callback = {"class_path": callback}
    if not isinstance(callback, dict) or "class_path" not in callback:
        raise ValueError(f"a callback needs a class_path, got {callback!s:.60}")
    return {**callback, "init_args": callback.get("init_args") or {}}
