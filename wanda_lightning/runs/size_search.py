"""The smallest sparsity with which a model fits into a number of bytes: calculated, then measured on the result."""

from collections.abc import Sequence

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from wanda_lightning.callbacks import PruningCallback
from wanda_lightning.callbacks.plumbing.settings_check import selection_of
from wanda_lightning.callbacks.pruning import run_folder
from wanda_lightning.export.size import CompressedSize, compressed_size, expected_zeros
from wanda_lightning.model.language_model import find_model
from wanda_lightning.runs.one_shot import no_training, prune, with_callbacks
from wanda_lightning.runs.search_result import SearchResult, Trial, percent
from wanda_lightning.runs.trials import DenseWeights
from wanda_lightning.sparsity import Unstructured

CURVE = 10
"""How many sizes of the curve are written down, besides those around the one that was chosen."""


def prune_to_size(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    callback: PruningCallback,
    weights: DenseWeights,
    result: SearchResult,
    grid: Sequence[float],
) -> None:
    """Prune as little as makes the compressed weights fit, evaluate and save.

    How many weights stay says how large the file will be, so that no sparsity needs to be tried out. Where more stay
    than was calculated, and the file that would be written is too large, the next sparsity follows.

    Args:
        trainer: The Trainer.
        model: The LightningModule.
        datamodule: Its data, for calibration and evaluation.
        callback: What is pruned with.
        weights: Keeps the dense weights.
        result: Says how many bytes; what is found goes into it, and into the folder, which holds no other search.
        grid: The sparsities to choose from, from 0 on.

    Raises:
        ValueError: If the model fits as it is, or at no sparsity.
    """
    with with_callbacks(trainer, weights, without=[callback]), no_training(trainer):
        trainer.fit(model, datamodule=datamodule)  # which loads the model
    calculated = _calculated(model, callback, grid)
    sizes = [trial.metrics["bytes"] for trial in calculated]
    most = result.budget.most
    number = next((number for number, size in enumerate(sizes) if size <= most), len(grid))
    if number == 0:
        raise ValueError(f"the model fits as it is: its weights take {sizes[0]:,} bytes, {most:,.0f} are allowed")
    callback.overwrite |= bool(result.dense)  # of this very search, which goes on after a crash
    result.dense = {"bytes": sizes[0]}
    while number < len(grid):
        result.trials = [
            calculated[at]
            for at in sorted({*range(0, len(grid), max(1, len(grid) // CURVE)), number - 1} - {0, number})
        ]
        if trainer.is_global_zero:
            result.save(run_folder(trainer))
        callback.pattern = Unstructured(grid[number])
        weights.bring_back(model)
        prune(trainer, model, datamodule)
        report = callback.report
        assert report is not None
        size = trainer.strategy.broadcast(_measured(trainer))
        result.trials.append(Trial(grid[number], report.sparsity, {"bytes": size}))
        result.final = dict(report.evaluations)
        if size <= most:
            result.found = grid[number]
            return
        rank_zero_info(f"{percent(grid[number])} gives {size:,} bytes, {size - most:,.0f} too many")
        number += 1
        callback.overwrite = True  # the results of this very search
    raise ValueError(
        f"the budget cannot be met: at the largest sparsity, {percent(grid[-1])}, the weights take {sizes[-1]:,} "
        f"bytes, {most:,.0f} are allowed"
    )


def _calculated(model: LightningModule, callback: PruningCallback, grid: Sequence[float]) -> list[Trial]:
    """Calculate at every sparsity how many weights are zero, and the size of the compressed ones."""
    held = find_model(model)
    size = CompressedSize(held)
    selection, trials = selection_of(callback, held), []
    for sparsity in grid:
        decoder, patterns = selection.choose(held, Unstructured(sparsity))
        asked = [(linear, patterns[linear.name]) for layer in decoder for linear in layer.linears]
        _, gone, weights = zip(*expected_zeros(asked), strict=True)
        trials.append(Trial(sparsity, sum(gone) / sum(weights), {"bytes": size.expected(asked)}))
    return trials


def _measured(trainer: Trainer) -> int:
    """Measure the model that was saved, on the first process."""
    return compressed_size(run_folder(trainer) / "model") if trainer.is_global_zero else 0
