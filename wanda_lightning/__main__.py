"""The ``wanda-lightning`` command. ``--help`` and ``--version`` answer before Lightning is imported."""

import os
import sys
import warnings
from importlib import import_module
from pkgutil import resolve_name

from wanda_lightning import __version__

HELP = """\
usage: wanda-lightning {prune,fit,validate,test} -c RECIPE [--option value ...]
       wanda-lightning {sweep,recipes,compare,inspect,compress,decompress} ...

Prune a Hugging Face language model, and fine-tune it with its zeros kept.

  prune      prune once, evaluate before and after, save; no training
  fit        prune, evaluate, fine-tune with the zeros kept, evaluate, save
  validate   evaluate a model on the validation set
  test       evaluate a model on the test set
  sweep      prune with several methods and sparsities in one go; a table and a picture
  recipes    list the recipes of the package; show or copy one
  compare    put the results of several runs into one table and one picture
  inspect    list what pruning a model would touch and take, and how sparse it is, without loading it
  compress   store a pruned model without its zeros, to ship it
  decompress undo that

  wanda-lightning prune -c wanda --model.pretrained MODEL
  wanda-lightning prune --help           all options of a sub-command
  wanda-lightning prune -c RECIPE --print_config

options:
  -h, --help     show this message
  --version      show the version
"""

COMMANDS = {
    "compare": "compare:main",
    "compress": "compression:compress_command",
    "decompress": "compression:decompress_command",
    "inspect": "inspection:main",
    "recipes": "packaged:main",
}
"""The functions of sub-commands that are not Lightning's."""


def main() -> None:
    """Run the command; errors of the user's making are one short message."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
    elif arguments[0] == "--version":
        print(f"wanda-lightning {__version__}")
    else:
        _run()


def _run() -> None:
    # Lightning 2.6 calls torch in a way that torch 2.13 deprecates; nothing a user can do about it.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    from wanda_lightning.messages import shortened
    from wanda_lightning.packaged import with_recipes_found

    try:
        if sys.argv[1] in COMMANDS:
            resolve_name(f"wanda_lightning.{COMMANDS[sys.argv[1]]}")(sys.argv[2:])
        else:
            sys.argv[1:] = with_recipes_found(sys.argv[1:])
            import_module("wanda_lightning.cli").run()
    except (ValueError, OSError) as error:
        if os.environ.get("WANDA_LIGHTNING_DEBUG"):
            raise
        sys.exit(f"wanda-lightning: error: {shortened(str(error))}\n(WANDA_LIGHTNING_DEBUG=1 shows where)")


if __name__ == "__main__":
    main()
