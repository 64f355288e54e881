"""``wanda-lightning inspect``."""

import sys

from wanda_lightning.arguments import Dtype
from wanda_lightning.cli.commands import run_function


def inspect(
    pretrained: str,
    num_samples: int = 128,
    sequence_length: int | None = None,
    dtype: Dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> None:
    """Show what pruning a model would touch and take, and how sparse the weights in its folder are.

    Args:
        pretrained: A hub name, of which only the config is read, or the folder of a model or of a run.
        num_samples: Calibration windows.
        sequence_length: Tokens in a window. Default: as much as the model takes, at most 2048.
        dtype: Data type of weights and activations. Default: the checkpoint's.
        device: Where pruning would run.
        trust_remote_code: Run code that the model's author put beside it.
    """
    from rich.console import Console

    from wanda_lightning.inspection.inspect_model import inspect_model

    inspection = inspect_model(pretrained, num_samples, sequence_length, dtype, device, trust_remote_code)
    Console().print(inspection.to_table())
    if inspection.weights and not inspection.weights.check.loads_whole:
        sys.exit(1)


def main(arguments: list[str]) -> None:
    """Run ``wanda-lightning inspect``."""
    run_function("inspect", inspect, arguments)
