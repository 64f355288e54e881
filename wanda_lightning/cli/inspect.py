"""``wanda-lightning inspect``."""

import sys

from wanda_lightning.cli.commands import run_function
from wanda_lightning.inspection.inspect_model import inspect_model


def main(arguments: list[str]) -> None:
    """Run ``wanda-lightning inspect``."""
    from rich.console import Console

    inspection = run_function("inspect", inspect_model, arguments)
    Console().print(inspection.to_table())
    if inspection.weights and not inspection.weights.check.loads_whole:
        sys.exit(1)
