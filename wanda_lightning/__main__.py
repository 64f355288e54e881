"""The ``wanda-lightning`` command. ``--help`` and ``--version`` answer before Lightning is imported."""

import os
import sys
import warnings
from importlib import import_module
from pkgutil import resolve_name

from wanda_lightning import __version__
from wanda_lightning.cli.commands import COMMANDS

_PURPOSES = "\n".join(f"  {name:<10} {command.purpose}" for name, command in COMMANDS.items())

HELP = f"""\
usage: wanda-lightning COMMAND [-c RECIPE] [--option value ...]

Prune a Hugging Face language model, and fine-tune it with its zeros kept.

{_PURPOSES}

  wanda-lightning recipes                                   # what there is to run
  wanda-lightning prune -c wanda --model.pretrained MODEL   # run it; MODEL is a hub name, a folder or a .gguf file
  wanda-lightning prune --help                              # a command's options, with an example

options:
  -h, --help     show this message
  --version      show the version
"""


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
    from wanda_lightning.cli.recipes import with_recipes_found

    try:
        name = sys.argv[1]
        if not name.startswith("-") and name not in COMMANDS:
            raise ValueError(f"there is no command {name!r}, it is one of {', '.join(COMMANDS)}")
        if name in COMMANDS and (function := COMMANDS[name].function) is not None:
            resolve_name(f"wanda_lightning.{function}")(sys.argv[2:])
        else:
            sys.argv[1:] = with_recipes_found(sys.argv[1:])
            import_module("wanda_lightning.cli.lightning_cli").run()
    except KeyboardInterrupt:  # while Lightning runs it ends the process by itself
        sys.exit(130)
    except Exception as error:
        from wanda_lightning.cli.messages import explained

        message = explained(error)
        if message is None or os.environ.get("WANDA_LIGHTNING_DEBUG"):
            raise
        sys.exit(f"wanda-lightning: error: {message}\n(WANDA_LIGHTNING_DEBUG=1 shows where)")


if __name__ == "__main__":
    main()
