"""The command line: LightningCLI with ``prune``, ``sweep`` and ``search``."""

import logging
import sys
from pathlib import Path
from typing import Any, NoReturn, cast

import lightning
from jsonargparse import ActionConfigFile, ActionYesNo
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from typing_extensions import override

from wanda_lightning import callbacks  # also so that YAML may use their short names
from wanda_lightning.callbacks.plumbing.process_group import leave_gloo_at_exit
from wanda_lightning.callbacks.plumbing.progress import StageBar
from wanda_lightning.callbacks.plumbing.run_report import keeps_files
from wanda_lightning.callbacks.pruning import pruning_callbacks, run_folder
from wanda_lightning.callbacks.shape_pruning import shape_callbacks, shrinking_of
from wanda_lightning.checkpoints.loading import load_config
from wanda_lightning.cli.help import description, usage
from wanda_lightning.cli.parser_messages import HelpFormatter, shortened, with_hint
from wanda_lightning.cli.quiet_terminal import leave_out_what_nobody_asked
from wanda_lightning.cli.recipes import find, is_inline
from wanda_lightning.cli.short_options import LONG, OF_CALLBACK
from wanda_lightning.data import TextDataModule
from wanda_lightning.runs.causal_lm import CausalLM
from wanda_lightning.runs.one_shot import end_if_asked, whole_run
from wanda_lightning.runs.trainer import PruningTrainer

EVALUATING = ("validate", "test")
"""The sub-commands that write no results."""


class _Parser(LightningArgumentParser):
    """A parser whose errors name the mistake and little else."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(with_hint(shortened(message), [*LONG, *OF_CALLBACK, *self._option_string_actions]), ex)


class _RecipeFile(ActionConfigFile):
    """``-c``, which takes the name of a packaged recipe where jsonargparse takes a file."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        recipe = values if is_inline(values) else str(find(values))
        super().__call__(parser, cfg, recipe, option_string)


class SaveConfigWithResults(SaveConfigCallback):
    """Writes ``config.yaml`` when a run begins; one that an earlier run left, only when this run is through."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, unless there is one."""
        there = (Path(str(trainer.log_dir)) / self.config_filename).exists()
        if self.already_saved or not trainer.strategy.broadcast(there):
            super().setup(trainer, pl_module, stage)

    def replace(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it now, whatever is there."""
        super().setup(trainer, pl_module, stage="")


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
        kept = {name: inherited[name] for name in ("fit", "validate", "test")}
        several = {"model", "datamodule"}
        return {"prune": inherited["fit"], "sweep": several, "search": several, **kept}

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
        parser.add_argument(
            "--overwrite",
            action=ActionYesNo,
            default=False,
            help="Replace the results in the folder also if they are of another model or of other settings.",
        )
        parser.add_argument("-v", "--details", action="store_true", help="Show also what was done to every layer.")
        parser.add_argument("-q", "--quiet", action="store_true", help="Show nothing but warnings.")
        adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5}}  # so that options can change parts of it
        ours = {"class_path": "CausalLM", "init_args": {"optimizer": adamw}}
        parser.set_defaults({"model": ours, "data": {"class_path": "TextDataModule"}})

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Show progress in our way, unless the user chose another one, or none."""
        settings = self.config_init[self.subcommand]
        chosen = [*(settings.trainer.callbacks or [])]  # a copy: Lightning adds to the list
        if settings.quiet:
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        if self.subcommand in EVALUATING and not settings.trainer.logger:  # files that nobody asked for
            kwargs["logger"], self.save_config_callback = False, None
        trainer: Any = super().instantiate_trainer(**kwargs)
        trainer.callbacks[:] = [
            StageBar() if isinstance(each, RichProgressBar) and each not in chosen else each
            for each in trainer.callbacks
            if not (settings.quiet and isinstance(each, ProgressBar | ModelSummary))
        ]
        return trainer

    @override
    def _parse_ckpt_path(self) -> None:
        """Resume with the settings that were given, as the Trainer does.

        Lightning would replace them by the checkpoint's hyperparameters, and what is not among these by defaults: a run
        that distils would go on without its teacher.
        """

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Leave model, report and configuration of an earlier run as they are until this one is through."""
        _check_exists(self.model)
        for callback in self._prunes:
            callback.overwrite = callback.overwrite or self.config_init[subcommand].overwrite
        if subcommand not in ("prune", "fit"):
            super()._run_subcommand(subcommand)
        else:
            with whole_run(self.trainer, self.model, will_save=True):
                super()._run_subcommand(subcommand)
        if subcommand in EVALUATING:
            return
        for callback in cast(Any, self.trainer).callbacks:
            if isinstance(callback, SaveConfigWithResults):
                callback.replace(self.trainer, self.model)
            elif isinstance(callback, callbacks.PruningCallback):  # its model may not be saved: nothing goes on there
                callback.run.files.forget_layers(self.trainer)
        if self.trainer.hub_url and self._is_to_tell:
            Console().print(f"The model is at {self.trainer.hub_url}", markup=False, soft_wrap=True)
        if self.trainer.push_failed:  # which was said; everything is on disk by now
            sys.exit(1)

    def after_prune(self) -> None:
        """Show the report."""
        self._show_report()

    def after_sweep(self) -> None:
        """Show the table of all runs."""
        folder = self.trainer.log_dir  # all processes must ask: they agree on it
        if self.trainer.comparison and self._is_to_tell:
            Console().print(self.trainer.comparison.to_table())
            Console().print(f"Results and comparison.png are in {folder}", markup=False, soft_wrap=True)

    def after_search(self) -> None:
        """Show the trials and the report."""
        if self.trainer.search_result and self._is_to_tell:
            Console().print(self.trainer.search_result.to_table())
        self._show_report()

    def before_fit(self) -> None:
        """Prune and evaluate first, so that the report tells pruning from training; not when resuming."""
        if isinstance(self.model, CausalLM):
            self.model.check_trainable()
        if self._prunes and not self.config_init[self.subcommand].get("ckpt_path"):
            self.trainer.prune(self.model, datamodule=self.datamodule, save=False)

    def after_fit(self) -> None:
        """Evaluate, save and show what training made of the pruned model."""
        if self._prunes:
            end_if_asked(self.trainer)
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            self.trainer.save_pretrained(self.model)
            self._show_report()

    @property
    def _prunes(self) -> list[Any]:
        """The callbacks that change the model before it is trained."""
        return [*shape_callbacks(self.trainer), *pruning_callbacks(self.trainer)]

    @property
    def _is_to_tell(self) -> bool:
        """Whether this process shows results: the first one does, unless the user wants to see warnings only."""
        return self.trainer.is_global_zero and not self.config_init[self.subcommand].quiet

    def _show_report(self) -> None:
        folder = run_folder(self.trainer)  # all processes must ask for it
        pruned: list[Any] = [callback.report for callback in pruning_callbacks(self.trainer)]
        reports = [each for each in (shrinking_of(self.trainer, self.model), *pruned) if each is not None]
        if reports and self._is_to_tell:
            for report in reports:
                Console().print(report.to_table(self.config_init[self.subcommand].details))
            searched = ["search.png"] * bool(self.trainer.search_result)  # not that of an earlier run
            saved = ["model", "adapter"] if self.config_init[self.subcommand].get("save", True) else []
            names = ["report.html", *searched, "shrinking.html", *saved]
            if keeps_files(self.trainer):
                there = ", ".join(name for name in names if (folder / name).exists())
                Console().print(f"Results are in {folder}: {there}", markup=False, soft_wrap=True)


def _check_exists(module: LightningModule) -> None:
    """Read the model's config: a mistyped name must not be taken for another model than the folder has results of."""
    if type(module) is CausalLM:  # others may take a name for something else
        load_config(module.pretrained, **{name: x for name, x in module.model_kwargs.items() if name != "dtype"})


def run(args: ArgsType = None) -> PruningCLI:
    """Run the command line.

    Args:
        args: Arguments. Default: those of the process.

    Returns:
        The CLI, after the sub-command is done.
    """
    leave_gloo_at_exit()
    leave_out_what_nobody_asked()
    return PruningCLI(
        CausalLM,
        TextDataModule,
        trainer_class=PruningTrainer,
        parser_class=_Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfigWithResults,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "wanda-lightning", "formatter_class": HelpFormatter}
        | {name: {"usage": usage(name), "description": description(name)} for name in PruningCLI.subcommands()},
        args=args,
    )
