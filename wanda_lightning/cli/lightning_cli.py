"""The command line: LightningCLI with ``prune`` and ``sweep``."""

import sys
from typing import Any, NoReturn

import lightning
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from typing_extensions import override

from wanda_lightning import callbacks  # noqa: F401 (so that YAML may use their short names)
from wanda_lightning.callbacks.plumbing.process_group import leave_gloo_at_exit
from wanda_lightning.cli.commands import COMMANDS
from wanda_lightning.cli.parser_messages import HelpFormatter, shortened
from wanda_lightning.cli.recipes import find, is_inline
from wanda_lightning.data import TextDataModule
from wanda_lightning.runs.causal_lm import CausalLM
from wanda_lightning.runs.trainer import PruningTrainer

MORE_HELP = """

A recipe (see `wanda-lightning recipes`) or a config.yaml sets all of this; options after it override it. Help on parts:
  --model.help CausalLM   --data.help TextDataModule   --trainer.callbacks.help WandaPruning"""


class _Parser(LightningArgumentParser):
    """A parser whose errors name the mistake and little else."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(shortened(message), ex)


class _RecipeFile(ActionConfigFile):
    """``-c``, which takes the name of a packaged recipe where jsonargparse takes a file."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        recipe = values if is_inline(values) else str(find(values))
        super().__call__(parser, cfg, recipe, option_string)


class PruningCLI(LightningCLI):
    """Prunes on ``prune``, and before training on ``fit``; shows and saves the results."""

    trainer: PruningTrainer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except SIGTERMException:
            sys.exit(143)  # some of Lightning's loops would say 0, as if all was done

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """List the sub-commands with the arguments that are not options."""
        inherited = LightningCLI.subcommands()
        both = {"model", "datamodule"}
        return {"prune": both, "sweep": both, **{name: inherited[name] for name in ("fit", "validate", "test")}}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make ``-c`` take the names of recipes; all else as Lightning has it."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={lightning.__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=_RecipeFile, help="Name of a recipe, or a file like one.")
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Use our module and datamodule unless others are named."""
        parser.set_defaults({"model": {"class_path": "CausalLM"}, "data": {"class_path": "TextDataModule"}})

    @override
    def _parse_ckpt_path(self) -> None:
        """Resume with the settings that were given, as the Trainer does.

        Lightning would replace them by the checkpoint's hyperparameters, and what is not among these by defaults: a run
        that distils would go on without its teacher.
        """

    def after_prune(self) -> None:
        """Show the report."""
        self._show_report()

    def after_sweep(self) -> None:
        """Show the table of all runs."""
        folder = self.trainer.log_dir  # all processes must ask: they agree on it
        if self.trainer.comparison and self.trainer.is_global_zero:
            Console().print(self.trainer.comparison.to_table())
            Console().print(f"Results and comparison.png are in {folder}", soft_wrap=True)

    def before_fit(self) -> None:
        """Prune and evaluate first, so that the report tells pruning from training; not when resuming."""
        if isinstance(self.model, CausalLM):
            self.model.check_trainable()
        self.trainer.will_save = self.trainer.pruning_callback is not None
        if self.trainer.pruning_callback and not self.config_init[self.subcommand].get("ckpt_path"):
            self.trainer.prune(self.model, datamodule=self.datamodule, save=False)

    def after_fit(self) -> None:
        """Evaluate, save and show what training made of the pruned model."""
        if self.trainer.pruning_callback:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            self.trainer.save_pretrained(self.model)
            self._show_report()

    def _show_report(self) -> None:
        callback, folder = self.trainer.pruning_callback, self.trainer.log_dir  # all processes must ask for log_dir
        if callback and callback.report and self.trainer.is_global_zero:
            Console().print(callback.report.to_table())
            Console().print(f"Results are in {folder}", soft_wrap=True)


def run(args: ArgsType = None) -> PruningCLI:
    """Run the command line.

    Args:
        args: Arguments. Default: those of the process.

    Returns:
        The CLI, after the sub-command is done.
    """
    leave_gloo_at_exit()
    return PruningCLI(
        CausalLM,
        TextDataModule,
        trainer_class=PruningTrainer,
        parser_class=_Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "wanda-lightning",
            "formatter_class": HelpFormatter,
        }
        | {
            name: {
                "usage": f"wanda-lightning {name} [-c RECIPE] [--option value ...]",
                "description": COMMANDS[name].description + MORE_HELP,
            }
            for name in PruningCLI.subcommands()
        },
        args=args,
    )
