"""``wanda-lightning compare``."""

from pathlib import Path

from wanda_lightning.cli.commands import run_function


def compare(runs: list[Path], output: Path | None = None, plot: Path | None = None, metric: str | None = None) -> None:
    """Print the results of several runs as one table.

    Args:
        runs: Folders of runs, or of several, as of a sweep.
        output: Write comparison.md and comparison.json into this folder.
        plot: Draw perplexity against sparsity into this file, a .png or .svg.
        metric: What to draw, by its name or the end of it. Default: the first perplexity, else the first.

    Raises:
        ValueError: If a folder holds no finished run, or there is nothing to draw.
    """
    from rich.console import Console

    from wanda_lightning.runs import plotting
    from wanda_lightning.runs.comparison import Comparison

    comparison = Comparison(runs)
    if plot:
        plotting.check(plot)
        plotting.metric_of(comparison, metric)
    elif metric:
        raise ValueError("--metric says what --plot draws: name a picture, as --plot runs.png, or leave --metric out")
    Console().print(comparison.to_table())
    if output:
        comparison.save(output)
    if plot:
        plotting.plot(comparison, plot, metric)


def main(arguments: list[str]) -> None:
    """Run ``wanda-lightning compare``."""
    runs = {"nargs": "+", "type": Path, "metavar": "RUN", "help": "Folder of a run, or of several, as of a sweep."}
    run_function("compare", compare, arguments, runs=runs)
