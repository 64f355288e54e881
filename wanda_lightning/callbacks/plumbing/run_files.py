"""The files of a run that goes on: its finished layers, and results that will replace those of an earlier run."""

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from wanda_lightning.callbacks.plumbing.run_identity import (
    describe_calibration,
    describe_model,
    describe_settings,
    name_of,
)
from wanda_lightning.callbacks.plumbing.run_report import RunReport, keeps_files
from wanda_lightning.callbacks.plumbing.unfinished_layers import UnfinishedLayers
from wanda_lightning.engine.journal import Journal
from wanda_lightning.model.language_model import find_model
from wanda_lightning.model.offload import is_on_disk

if TYPE_CHECKING:
    from wanda_lightning.callbacks.pruning import PruningCallback


class RunFiles:
    """Begins and ends runs in their folder.

    Args:
        callback: Says which folder, and what is asked for.
        results: What is to be written.

    Attributes:
        all_finished: Whether no layer is left to prune.
        will_save: Whether the model is to be saved in the end.
    """

    def __init__(self, callback: "PruningCallback", results: RunReport) -> None:
        self.asked, self.results = callback, results
        self.all_finished = self.will_save = False
        self._unfinished: UnfinishedLayers | None = None

    def begin(self, trainer: Trainer, module: LightningModule, loaded: bool = True) -> None:
        """Begin a run: refuse a folder with the results of another one, and keep earlier results until the end.

        Takes and raises what :meth:`check_folder` does.
        """
        self.check_folder(trainer, module, loaded)
        self.results.begin(self.asked.folder(trainer))

    def check_folder(self, trainer: Trainer, module: LightningModule, loaded: bool = True) -> None:
        """Refuse a folder with the results of another run.

        Args:
            trainer: The Trainer.
            module: Its module.
            loaded: Whether model and data are loaded. If not, only the settings and the model's name are compared.

        Raises:
            ValueError: If the folder holds results of another run, and they are not to be overwritten.
        """
        folder = self.asked.folder(trainer)
        if loaded:
            now = {"model": describe_model(module), "calibration": describe_calibration(trainer)}
        else:
            now = {"model": {"name": name} if (name := name_of(module)) else {}}
        if keeps_files(trainer):
            self.results.check_folder(folder, self.asked.overwrite, settings=describe_settings(self.asked), **now)

    def end_fit(self, trainer: Trainer, module: LightningModule) -> None:
        """End ``fit``: forget the finished layers, unless they are wanted until a save, and write the results.

        Training has added its losses to them, a checkpoint may have brought them to a new folder, and what regrew is
        dense again.
        """
        until_saved = self._unfinished is not None and self._unfinished.until_saved
        if self.asked.resume is None and not until_saved and not is_on_disk(find_model(module)):
            self.forget_layers(trainer)
        folder = self.asked.folder(trainer)  # every process must ask for it
        self.results.save(trainer, folder)
        if self.end_run() and (report := self.results.report) is not None and keeps_files(trainer):
            rank_zero_info(report.summary)
            rank_zero_info(f"The report is in {folder}: report.html, pruning.md, pruning.json")

    def end_run(self) -> bool:
        """End a run: write the results, unless it is part of a longer one; return whether it is not."""
        if ended := self.results.end():
            self.will_save = False
        return ended

    def abandon(self) -> None:
        """End a run that failed: earlier results stay, and others may go on with the layers that are finished."""
        self.results.drop()
        self.will_save = False
        if self._unfinished is not None:
            self._unfinished.release()

    def open_layers(self, trainer: Trainer, until_saved: bool = False, streamed: bool = False) -> Journal | None:
        """Keep other runs out of the folder from now on, if finished layers are to be kept there.

        Args:
            trainer: The Trainer.
            until_saved: Keep them, unless the callback says otherwise, until :meth:`forget_layers` is called.
            streamed: Whether the model is on disk.

        Returns:
            Where they are kept, or None.
        """
        asked = self.asked
        if asked.schedule is not None or not keeps_files(trainer):
            return None
        if self._unfinished is None:
            by_default = until_saved or asked.output_dir is not None
            keep = by_default if asked.resume is None else asked.resume
            if not (keep or streamed or asked.resume is False):
                return None
            self._unfinished = UnfinishedLayers(asked.folder(trainer), keep, until_saved)
        self._unfinished.open(trainer)
        return self._unfinished.journal(streamed)

    def forget_finished(self, trainer: Trainer) -> None:
        """Delete the layers of a pruning that is through: other weights are to be pruned."""
        if self.all_finished:
            self.forget_layers(trainer)

    def forget_layers(self, trainer: Trainer) -> None:
        """Delete the finished layers on disk: the model is saved, or nobody asked for them."""
        if self._unfinished is not None:
            self._unfinished.forget(trainer)
        self._unfinished, self.all_finished = None, False
