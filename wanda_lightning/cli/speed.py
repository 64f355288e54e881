"""``wanda-lightning speed``."""

from pathlib import Path

from wanda_lightning.arguments import Dtype
from wanda_lightning.cli.commands import run_function


def speed(
    models: list[str],
    prompt: int = 512,
    new_tokens: int = 32,
    batch_sizes: list[int] = [1, 8],  # noqa: B006 (jsonargparse shows it)
    rounds: int = 10,
    dtype: Dtype = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    output: Path | None = None,
) -> None:
    """Measure how fast models read a prompt and decode, and what they take, against the first of them.

    Args:
        models: Models, the dense one first.
        prompt: How many tokens the prompt has.
        new_tokens: How many tokens are decoded.
        batch_sizes: How many sequences are decoded at once; each is measured.
        rounds: How often each model has its turn; at least 6 to call a difference one.
        dtype: Data type of the weights. Default: the checkpoint's; many processors are slow in half precision.
        device: Where it computes, such as cpu or cuda:0. Default: the GPU, if there is one.
        trust_remote_code: Run code that the models' authors put beside them.
        output: Write speed.json, speed.md and speed.png into this folder.
    """
    from rich.console import Console

    from wanda_lightning.runs.generation_speed import measure_speed
    from wanda_lightning.runs.plotting import check

    if output:
        check(output / "speed.png")
    report = measure_speed(
        models, prompt, new_tokens, batch_sizes, rounds, dtype, device, trust_remote_code, progress=True
    )
    Console().print(report.to_table())
    if output:
        report.save(output)


def main(arguments: list[str]) -> None:
    """Run ``wanda-lightning speed``."""
    models = {
        "nargs": "+",
        "type": str,
        "metavar": "MODEL",
        "help": "Hub name, folder of a run or of a model, or .gguf; the dense one first.",
    }
    run_function("speed", speed, arguments, models=models)
