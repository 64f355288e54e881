"""What ``--help`` says of the sub-commands of LightningCLI: the options that matter, before torch is imported."""

from wanda_lightning.cli.commands import COMMANDS
from wanda_lightning.cli.short_options import METHODS

ALL = "--help-all"
_SOURCES = "builtin (default), .txt, .jsonl, c4, wikitext2, any data set"

_OPTIONS = {
    "MODEL": "a hub name, a folder or a .gguf file",
    "--method NAME": f"{', '.join(METHODS)}; by default wanda",
    "--sparsity FRACTION": "the share of the weights that goes, in [0, 1); by default 0.5",
    "--pattern N:M": "keep N of every M consecutive inputs, such as 2:4",
    "--methods LIST": "such as '[wanda, sparsegpt]'",
    "--sparsities LIST": "such as '[0.4, 0.6]'",
    "--patterns LIST": "such as '[\"2:4\"]'",
    "--max_perplexity_increase X": "by which fraction the perplexity may be higher, such as 0.05",
    "--max_bytes N": "instead: how large the compressed weights may be",
    "--metric NAME --max_drop X": "instead: how much lower a metric may be; --max_rise X: how much higher",
    "--max_steps N": "training steps, by default 100",
    "--data TEXT": f"to calibrate with: {_SOURCES}",
    "--eval TEXT": "to evaluate on, named alike; by default a part of that",
    "--output DIR": "where model and report go; by default results/METHOD, or what the recipe says",
    "--num_samples N": "calibration windows, by default 128",
    "--sequence_length N": "tokens in a window, by default up to 2048",
    "--dtype NAME": "float32, bfloat16 or float16; by default the checkpoint's",
    "--trust_remote_code true": "run code that the model's author put beside it",
    "--push_to_hub ME/NAME": "push the saved model to the hub, with its card",
    "--prompt TEXT": "a text that the model continues in the report, instead of three short ones; may be repeated",
    "--overwrite": "replace other results that are there",
    "-c RECIPE": "start from a recipe, see `wanda-lightning recipes`; options override it",
    "-v, -q": "show also what was done to every layer; show nothing but warnings",
    "-q": "show the figures alone",
    ALL: "every option, also of the Trainer",
}
_EVALUATING = {
    "--data TEXT": f"to evaluate on a part of: {_SOURCES}",
    "--eval TEXT": "to evaluate on instead, named alike",
}
_OTHERWISE = {
    "fit": {
        "--data TEXT": f"to calibrate and train with: {_SOURCES}",
        "--output DIR": "where model and report go; by default results/METHOD_finetune, or what the recipe says",
        "--sequence_length N": "tokens in a window, by default 512",
    },
    "validate": _EVALUATING,
    "test": _EVALUATING,
    "sweep": {
        "-q": "show nothing but warnings",
        "--output DIR": "where the table, the picture and a report of each run go; by default results/sweep",
    },
    "search": {"--output DIR": "where trials, model and report go; by default results/search"},
}
"""What is said in other words of an option of these sub-commands."""
_SAVING = ("--push_to_hub ME/NAME",)
_PRUNING = ("--method NAME", "--sparsity FRACTION", "--pattern N:M", "--prompt TEXT")
_SEARCHING = ("--max_perplexity_increase X", "--max_bytes N", "--metric NAME --max_drop X")
_SWEEPING = ("--methods LIST", "--sparsities LIST", "--patterns LIST")
_TRAINING = ("--max_steps N",)
_LEFT_OUT = {
    "prune": (*_SWEEPING, *_SEARCHING, *_TRAINING, "-q"),
    "fit": (*_SWEEPING, *_SEARCHING, "-q"),
    "sweep": (*_PRUNING, *_SEARCHING, *_TRAINING, *_SAVING, "--overwrite", "-v, -q"),
    "search": (*_PRUNING[1:], *_SWEEPING, *_TRAINING, *_SAVING, "-q"),
    "validate": (
        *_PRUNING,
        *_SWEEPING,
        *_SEARCHING,
        *_TRAINING,
        *_SAVING,
        "--num_samples N",
        "--output DIR",
        "--overwrite",
        "-v, -q",
    ),
}
_LEFT_OUT["test"] = _LEFT_OUT["validate"]

_PARTS = """\
A recipe or a config.yaml sets all options; those after it override it. Help on parts:
  --model.help CausalLM   --data.help TextDataModule   --trainer.callbacks.help WandaPruning"""


def usage(name: str) -> str:
    """Return the first line of a sub-command's help."""
    return f"wanda-lightning {name} [MODEL] [-c RECIPE] [--option value ...]"


def description(name: str) -> str:
    """Describe a sub-command and its most useful options.

    Args:
        name: A sub-command of LightningCLI.

    Returns:
        What its help says below the usage.
    """
    said = _OPTIONS | _OTHERWISE.get(name, {})
    shown = {option: text for option, text in said.items() if option not in _LEFT_OUT[name]}
    width = max(map(len, shown))
    options = [f"  {option:{width}}  {text}" for option, text in shown.items()]
    listed = "\n".join(["The options that matter most:", *options])
    return f"{COMMANDS[name].description}\n\n{listed}\n\n{_PARTS}"
