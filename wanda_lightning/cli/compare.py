"""``wanda-lightning compare``."""

import argparse
from collections.abc import Sequence

from wanda_lightning.cli.commands import parser_settings
from wanda_lightning.runs.comparison import Comparison


def main(arguments: Sequence[str]) -> None:
    """Run ``wanda-lightning compare``."""
    parser = argparse.ArgumentParser(**parser_settings("compare"))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", metavar="FOLDER", help="write comparison.md and comparison.json there")
    parser.add_argument("--plot", metavar="FILE", help="draw perplexity against sparsity, as .png or .svg")
    parser.add_argument("--metric", help="what to draw (default: the first perplexity)")
    options = parser.parse_args(arguments)

    from rich.console import Console

    comparison = Comparison(options.runs)
    Console().print(comparison.to_table())
    if options.output:
        comparison.save(options.output)
    if options.plot:
        from wanda_lightning.runs.plotting import plot

        plot(comparison, options.plot, options.metric)
