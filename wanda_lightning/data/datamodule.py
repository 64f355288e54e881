"""TextDataModule: the calibration, training and evaluation windows of one run.

Shapes: B batch, T tokens in a window, N windows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from wanda_lightning.arguments import plain, whole_number
from wanda_lightning.data.evaluation_sets import Evaluation, evaluation_rows, evaluation_sets
from wanda_lightning.data.model_fit import ModelFit
from wanda_lightning.data.resuming import ResumableLoader, ShuffledByEpoch
from wanda_lightning.data.source import WITHOUT_HUB, Split
from wanda_lightning.data.sources import open_source
from wanda_lightning.data.windowed_text import KnownWindows, held_out_windows

LEAST = {
    "num_samples": 1, "sequence_length": 2, "seed": 0, "calibration_batch_size": 1, "batch_size": 1,
    "max_evaluation_windows": 1, "num_workers": 0,
}  # fmt: skip
OPTIONAL = ("sequence_length", "max_evaluation_windows")


class TextDataModule(LightningDataModule):
    """Text as windows of tokens: random ones for calibration, consecutive ones for training and evaluation.

    Every batch is ``{"input_ids": (B, T) int64}``, and windows are full. In evaluation two kinds of rows are padded,
    and their batches then have an ``attention_mask`` too: the last window where ``keep_last_window`` asks for it, and
    rows without content that let every process have as many (no window is counted twice).

    A ``source`` without splits of its own (``"builtin"``, a file) is divided in three disjoint parts: 30 % for
    calibration, 40 % for training, 30 % for evaluation. Where ``evaluation`` names another source, nothing is set
    aside: calibration and training both take all of ``source``, and evaluation takes all of ``evaluation``.

    Args:
        source: Text for calibration and training. "builtin" (Python's language reference, needs no download); a .txt,
            .md, .jsonl or .json file (one JSON object a line, or a list); "wikitext2" or "c4", as the papers use them;
            a local folder that holds a data set; or the name of a data set on the hub.
        evaluation: Text for validation and testing, named in the same way; a list of several, or several by name. Each
            of several is evaluated by itself, as ``evaluation_names`` says. Default: the evaluation part of ``source``.
        tokenizer: Name or folder of a tokenizer, or a tokenizer. Default: that of the LightningModule, its attribute
            ``tokenizer``, else the one that belongs to its hyperparameter ``pretrained``.
        num_samples: Number of calibration windows.
        sequence_length: Tokens in a window. Default: 2048, or the model's limit where that is lower.
        seed: Seed of the calibration windows, and of the order of training (with several processes, the Trainer's own).
        calibration_batch_size: Calibration windows in a batch.
        batch_size: Training and evaluation windows in a batch.
        max_evaluation_windows: Evaluate on the first so many windows only. Default: all (of C4, the usual 256).
        text_field: Field or column that holds the text, or conversations: lists of messages with role and content.
        config_name: Configuration of the data set in ``source``, if it has several.
        train_split: Split of a data set for calibration and training; "train[:1%]" takes the first hundredth.
        evaluation_split: Split of a data set for evaluation. Where it equals ``train_split``, the split is divided as a
            file is.
        num_workers: Worker processes of each dataloader.
        keep_last_window: Evaluate on the text's last, shorter window too.
        evaluate_calibration: Evaluate on the calibration windows too, as a set named "calibration".

    Raises:
        ValueError: If a value is out of range, or ``source`` or ``evaluation`` names a file that does not exist.

    Examples:
        >>> from transformers import ByT5Tokenizer  # its tokens are bytes, so it needs no file
        >>> data = TextDataModule(tokenizer=ByT5Tokenizer(), num_samples=2, sequence_length=512)
        >>> [batch["input_ids"].shape for batch in data.calibration_dataloader()]
        [torch.Size([1, 512]), torch.Size([1, 512])]
    """

    def __init__(
        self,
        source: str = "builtin",
        evaluation: Evaluation = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        num_samples: int = 128,
        sequence_length: int | None = None,
        seed: int = 0,
        calibration_batch_size: int = 1,
        batch_size: int = 1,
        max_evaluation_windows: int | None = None,
        text_field: str = "text",
        config_name: str | None = None,
        train_split: str = "train",
        evaluation_split: str = "test",
        num_workers: int = 0,
        keep_last_window: bool = False,
        evaluate_calibration: bool = False,
    ) -> None:
        super().__init__()
        source, evaluation, tokenizer, seed = map(plain, (source, evaluation, tokenizer, seed))
        num_samples, sequence_length, num_workers = map(plain, (num_samples, sequence_length, num_workers))
        calibration_batch_size, batch_size = plain(calibration_batch_size), plain(batch_size)
        max_evaluation_windows = plain(max_evaluation_windows)
        self.save_hyperparameters(ignore=["tokenizer"], logger=False)
        _check(self.hparams)
        self.source, self.evaluation, self.tokenizer = source, evaluation, tokenizer
        self.num_samples, self.sequence_length, self.seed = num_samples, sequence_length, seed
        self.calibration_batch_size, self.batch_size, self.num_workers = calibration_batch_size, batch_size, num_workers
        self.max_evaluation_windows, self.keep_last_window = max_evaluation_windows, keep_last_window
        self._sets = evaluation_sets(evaluation, source, text_field, evaluation_split)
        self._source = open_source(
            source,
            whole=all(each.source is not None for each in self._sets),
            text_field=text_field,
            config_name=config_name,
            train_split=train_split,
            evaluation_split=evaluation_split,
            seed=seed,
        )
        self.evaluation_names = [each.name for each in self._sets] + ["calibration"] * evaluate_calibration
        if len(set(self.evaluation_names)) < len(self.evaluation_names):
            raise ValueError("an evaluation set cannot be named 'calibration' where evaluate_calibration is set")
        self._fit = ModelFit()
        self._windows = KnownWindows()

    @override
    def prepare_data(self) -> None:
        """Download data and tokenizer, on one process."""
        for source in (self._source, *(each.source for each in self._sets)):
            if source is not None:
                source.prepare()
        if self.tokenizer is not None:  # the module's own is the module's to download
            self._fit.tokenizer(self.tokenizer, None)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Refuse a run without a tokenizer, and windows that are too long for the model, as far as it is known by now.

        Text is read, and a tokenizer loaded, when a dataloader first needs it.
        """
        self._fit.wanted_tokenizer(self.tokenizer, _module(self.trainer))
        self._fit.check_length(self.sequence_length, _module(self.trainer))

    def calibration_dataloader(self) -> DataLoader:
        """Return ``num_samples`` random windows of the calibration part; needs a tokenizer, but no Trainer."""
        return self._in_order(_rows(self._windows_of("calibration")[0]), self.calibration_batch_size)

    @override
    def train_dataloader(self) -> DataLoader:
        """Return the consecutive windows of the training part, shuffled anew in each epoch of a Trainer."""
        rows = _rows(self._windows_of("train")[0])
        sampler = ShuffledByEpoch(rows, self.seed)
        order = {"sampler": sampler, "generator": sampler.generator}
        return ResumableLoader(rows, self.batch_size, num_workers=self.num_workers, **order)  # type: ignore[arg-type]

    @override
    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the consecutive windows of the evaluation set, in order; a list where there are several sets."""
        processes = _processes(self.trainer)
        windows = [self._windows_of("evaluation", number) for number in range(len(self._sets))]
        if len(self.evaluation_names) > len(self._sets):  # of evaluate_calibration
            windows.append(self._windows_of("calibration"))
        loaders = [self._in_order(evaluation_rows(*each, processes), self.batch_size) for each in windows]
        return loaders[0] if len(loaders) == 1 else loaders

    @override
    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the same windows as ``val_dataloader``."""
        return self.val_dataloader()

    def held_out_dataloader(self, max_windows: int) -> DataLoader:
        """Return windows of ``source`` that neither calibration nor evaluation sees, to choose settings by."""
        asked = {"num_samples": self.num_samples, "seed": self.seed, "max_windows": max_windows}
        windows_NT = held_out_windows(self._source, *self._tokenizer_and_length(), **asked)
        return self._in_order(evaluation_rows(windows_NT, processes=_processes(self.trainer)), self.batch_size)

    def describe(self) -> dict[str, str | int]:
        """Say what calibration saw, for a report: source, evaluation, number of samples, sequence length and seed."""
        return {
            "source": self.source,
            "evaluation": ", ".join(each.location for each in self._sets),
            "num_samples": self.num_samples,
            "sequence_length": self._tokenizer_and_length()[1],
            "seed": self.seed,
        }

    def _in_order(self, rows: list[dict[str, Tensor]], batch_size: int) -> DataLoader:
        generator = torch.Generator().manual_seed(self.seed)  # else every iteration draws from the global one
        return DataLoader(rows, batch_size, generator=generator, num_workers=self.num_workers)  # type: ignore[arg-type]

    def _windows_of(self, split: Split, number: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the windows of a split (of the evaluation set of that number), and a last shorter one if wanted."""
        tokenizer_and_length = self._tokenizer_and_length()
        evaluation = split == "evaluation"
        source = (self._sets[number].source or self._source) if evaluation else self._source
        try:
            windows = self._windows.get(
                f"{split} {number}",
                source,
                split,
                *tokenizer_and_length,
                num_samples=self.num_samples,
                seed=self.seed,
                max_evaluation_windows=self.max_evaluation_windows,
                keep_last_window=self.keep_last_window,
            )
            self._fit.check_ids(windows[0], _module(self.trainer))
            return windows
        except ValueError as error:
            name = self._sets[number].location if evaluation else self.source
            raise ValueError(f"{split} part of {name!r}: {error}") from error

    def _tokenizer_and_length(self) -> tuple[PreTrainedTokenizerBase, int]:
        tokenizer = self._fit.tokenizer(self.tokenizer, _module(self.trainer))
        return tokenizer, self._fit.length(self.sequence_length, tokenizer, _module(self.trainer))


def _check(settings: Mapping[str, Any]) -> None:
    if not isinstance(settings["source"], str):
        raise ValueError(f"source must be a name, got a {type(settings['source']).__name__}; {WITHOUT_HUB}")
    for name, least in LEAST.items():
        if settings[name] is not None or name not in OPTIONAL:
            whole_number(name, settings[name], least)


def _rows(windows_NT: Tensor) -> list[dict[str, Tensor]]:
    # A list of dicts is a map-style data set: the default collation makes {"input_ids": (B, T)} of it.
    return [{"input_ids": window_T} for window_T in windows_NT]


def _module(trainer: Trainer | None) -> LightningModule | None:
    return None if trainer is None else trainer.lightning_module


def _processes(trainer: Trainer | None) -> int:
    return 1 if trainer is None else trainer.world_size
