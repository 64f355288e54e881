"""The ``wanda-lightning`` command. What needs no model is answered before torch or Lightning is imported."""

import logging
import os
import sys
import warnings
from io import TextIOWrapper
from pkgutil import resolve_name

from wanda_lightning.cli.commands import COMMANDS
from wanda_lightning.cli.quiet_terminal import FirstRetry
from wanda_lightning.cli.unread_output import outlive_readers

_PURPOSES = "\n".join(f"  {name:<10} {command.purpose}" for name, command in COMMANDS.items())

HELP = f"""\
usage: wanda-lightning COMMAND [MODEL] [-c RECIPE] [--option value ...]

Prune a Hugging Face language model, and fine-tune it with its zeros kept.

{_PURPOSES}

  wanda-lightning prune MODEL --sparsity 0.6         # MODEL is a hub name, a folder or a .gguf file
  wanda-lightning recipes                            # longer runs that are ready to be run, as `fit MODEL -c NAME`
  wanda-lightning prune --help                       # a command's options, with an example

options:
  -h, --help     show this message
  --version      show the version
"""


def main() -> None:
    """Run the command; mistakes of the user are one short message and exit code 2, failures exit with 1."""
    outlive_readers()
    if isinstance(sys.stdout, TextIOWrapper):  # a file or pipe on Windows knows few of the characters that models say
        sys.stdout.reconfigure(errors="replace")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
    elif arguments[0] == "--version":
        from wanda_lightning import __version__

        print(f"wanda-lightning {__version__}")
    else:
        try:
            _run(arguments)
        except KeyboardInterrupt:  # while Lightning runs it ends the process by itself
            sys.exit(130)
        except Exception as error:
            _explain(error)


def _run(arguments: list[str]) -> None:
    logging.getLogger("huggingface_hub.utils._http").addFilter(FirstRetry())
    name = arguments[0]
    if not name.startswith("-") and name not in COMMANDS:
        raise ValueError(f"there is no command {name!r}, it is one of {', '.join(COMMANDS)}")
    if name in COMMANDS:
        if (function := COMMANDS[name].function) is not None:
            resolve_name(f"wanda_lightning.cli.{function}")(arguments[1:])
            return
        from wanda_lightning.cli import help
        from wanda_lightning.cli.first_look import refuse_at_once
        from wanda_lightning.cli.short_options import written_out

        if not {"-h", "--help"}.isdisjoint(arguments):
            print(f"usage: {help.usage(name)}\n\n{help.description(name)}")
            return
        arguments = ["--help" if argument == help.ALL else argument for argument in arguments]
        sys.argv[1:] = written_out(arguments)  # there also Lightning finds it, which starts further processes
        refuse_at_once(sys.argv[1:])
    # Lightning 2.6 calls torch in a way that torch 2.13 deprecates; nothing a user can do about it.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    from wanda_lightning.cli.lightning_cli import run

    run()


def _explain(error: Exception) -> None:
    from wanda_lightning.cli.messages import exit_code, explained

    message = explained(error)
    if message is None or os.environ.get("WANDA_LIGHTNING_DEBUG"):
        raise error
    print(f"wanda-lightning: error: {message}\n(WANDA_LIGHTNING_DEBUG=1 shows where)", file=sys.stderr)
    sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
