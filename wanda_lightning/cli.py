"""The command line: LightningCLI with a ``prune`` sub-command."""

from typing import NoReturn

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console

from wanda_lightning import callbacks  # noqa: F401 (so that YAML may use their short names)
from wanda_lightning.data import TextDataModule
from wanda_lightning.messages import shortened
from wanda_lightning.module import CausalLM
from wanda_lightning.trainer import PruningTrainer


class _Parser(LightningArgumentParser):
    """A parser whose errors name the mistake and little else."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(shortened(message), ex)


class PruningCLI(LightningCLI):
    """Prunes on ``prune``, and before training on ``fit``; shows and saves the results."""

    trainer: PruningTrainer

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """List the sub-commands with the arguments that are not options."""
        lightning = LightningCLI.subcommands()
        both = {"model", "datamodule"}
        return {"prune": both, "sweep": both, **{name: lightning[name] for name in ("fit", "validate", "test")}}

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
        parser_kwargs={"prog": "wanda-lightning"}
        | {
            name: {"usage": f"wanda-lightning {name} [-c CONFIG] [--option value ...]"}
            for name in PruningCLI.subcommands()
        },
        args=args,
    )
