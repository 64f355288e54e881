"""The sub-commands of ``wanda-lightning``: what each does, in one sentence and one example."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        purpose: What it does, in one sentence.
        example: How it is run.
        function: What runs it, ``module:function`` in ``cli/``; None for those of LightningCLI.
    """

    purpose: str
    example: str
    function: str | None = None

    @property
    def description(self) -> str:
        """What ``--help`` starts with."""
        return f"{self.purpose}\n\n  {self.example}"


COMMANDS = {
    "prune": Command(
        "Prune once, evaluate before and after, save the model and a report; no training.",
        "wanda-lightning prune MODEL --method wanda --sparsity 0.6 --data my_text.txt --output results/mine",
    ),
    "fit": Command(
        "Prune, fine-tune with the zeros kept, evaluate at each stage, save.",
        "wanda-lightning fit MODEL --method wanda --sparsity 0.6 --max_steps 200",
    ),
    "validate": Command(
        "Evaluate a model on the validation set; its weights do not change.",
        "wanda-lightning validate results/wanda/model --sequence_length 512",
    ),
    "test": Command(
        "Evaluate a model on the test set; its weights do not change.",
        "wanda-lightning test results/wanda/model --eval wikitext2",
    ),
    "sweep": Command(
        "Prune with several methods and sparsities, each from the dense weights; a table and a picture.",
        "wanda-lightning sweep MODEL --sparsities '[0.4, 0.6]'",
    ),
    "search": Command(
        "Find the largest sparsity within a budget, or the smallest that fits, and prune to it.",
        "wanda-lightning search MODEL --method wanda --max_perplexity_increase 0.05",
    ),
    "compare": Command(
        "Put the results of several runs into one table and one picture.",
        "wanda-lightning compare results/wanda results/sparsegpt --plot runs.png",
        "compare:main",
    ),
    "inspect": Command(
        "List what pruning a model would touch and take, and how sparse it is, without loading it.",
        "wanda-lightning inspect MODEL --num_samples 128 --sequence_length 2048",
        "inspect:main",
    ),
    "generate": Command(
        "Show what a model says: texts that it continues.",
        'wanda-lightning generate results/wanda "The capital of France is"',
        "generate:main",
    ),
    "speed": Command(
        "Measure how fast models read a prompt and decode, and what they take, in turns; dense against pruned.",
        "wanda-lightning speed MODEL results/wanda/model --output results/speed",
        "speed:main",
    ),
    "compress": Command(
        "Store a pruned model without its zeros, to ship it.",
        "wanda-lightning compress results/wanda/model to-ship",
        "compress:compress_command",
    ),
    "decompress": Command(
        "Restore a compressed model as it was, bit by bit.",
        "wanda-lightning decompress to-ship model",
        "compress:decompress_command",
    ),
    "recipes": Command(
        "List the recipes of the package; show one, or copy it to change it.",
        "wanda-lightning recipes copy wanda_finetune mine.yaml",
        "recipes:main",
    ),
}


def run_function(
    name: str, function: Callable[..., None], arguments: list[str], /, **positional: dict[str, Any]
) -> None:
    """Call the function behind a sub-command with arguments of the command line.

    Its signature and docstring become the arguments and their help: parameters without a default are positional, those
    with one are options.

    Args:
        name: The sub-command.
        function: What it does.
        arguments: What follows the sub-command.
        positional: Parameters that are positional and may be left out or repeated, as ``add_argument`` takes them.
    """
    from wanda_lightning.cli.parser_messages import FunctionParser, HelpFormatter

    parser = FunctionParser(
        prog=f"wanda-lightning {name}", description=COMMANDS[name].description, formatter_class=HelpFormatter
    )
    for parameter, settings in positional.items():
        parser.add_argument(parameter, **settings)
    parser.add_function_arguments(function, as_positional=True, skip=set(positional))
    function(**parser.parse_args(arguments))
