"""The sparsity that a budget allows: trials on held-out windows, and the model that comes of them."""

import math
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from wanda_lightning.allocation.allocator import CannotSplitError
from wanda_lightning.arguments import plain, positive_up_to, whole_number
from wanda_lightning.callbacks import PruningCallback, ZeroShotEvaluation
from wanda_lightning.callbacks.plumbing.leftovers import remove_trials
from wanda_lightning.callbacks.plumbing.run_identity import describe_settings
from wanda_lightning.callbacks.plumbing.run_report import ADVICE
from wanda_lightning.callbacks.pruning import at_sparsity, pruning_callbacks, run_folder
from wanda_lightning.callbacks.shape_pruning import shape_callbacks
from wanda_lightning.json_files import read_json
from wanda_lightning.model.replaced import replaced
from wanda_lightning.report.pruning_report import REPORT
from wanda_lightning.runs import plotting, search_plot
from wanda_lightning.runs.bisection import last_within
from wanda_lightning.runs.budget import Budget
from wanda_lightning.runs.held_out import HeldOut
from wanda_lightning.runs.one_shot import prune, with_callbacks
from wanda_lightning.runs.search_result import SearchResult, Trial, percent
from wanda_lightning.runs.size_search import prune_to_size
from wanda_lightning.runs.trials import (
    DenseWeights,
    check_whole,
    evaluate,
    logged_metrics,
    other_settings,
    prune_and_evaluate,
    settings_of,
)
from wanda_lightning.sparsity import Unstructured


def search(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    budget: Budget,
    step: float,
    held_out_windows: int,
) -> SearchResult:
    """Find the sparsity that a budget allows, and prune to it; see :meth:`PruningTrainer.search`."""
    held_out_windows = plain(held_out_windows)
    whole_number("held_out_windows", held_out_windows, 1)
    grid, callback, folder = _grid(step), _callback(trainer), run_folder(trainer)
    check_whole(trainer, model, datamodule, "a search")
    plotting.check(folder / "search.png")
    pruning = {name: value for name, value in describe_settings(callback).items() if name != "sparsity"}
    settings = settings_of(trainer, model, datamodule, pruning=pruning)
    weights = DenseWeights(callback.layers)
    with replaced(callback.run.results, "searched", True):
        if budget.is_of_size:
            result = _begun(folder, SearchResult(budget, settings), callback.overwrite)
            prune_to_size(trainer, model, datamodule, callback, weights, result, grid)
        else:
            held_out = HeldOut(datamodule, held_out_windows)
            settings["held_out"] = {"windows": held_out_windows}
            result = _begun(folder, SearchResult(budget, settings), callback.overwrite)
            _find(trainer, model, held_out, callback, weights, result, grid)
            assert result.found is not None
            callback.pattern = Unstructured(result.found)
            weights.bring_back(model)
            result.final = dict(prune(trainer, model, datamodule).evaluations)
    _save(trainer, result, folder)
    if trainer.is_global_zero:
        remove_trials(folder, [f"{trial.sparsity:g}" for trial in result.trials])
        search_plot.plot(result, folder / "search.png")
    return result


def _find(
    trainer: Trainer,
    model: LightningModule,
    held_out: HeldOut,
    callback: PruningCallback,
    weights: DenseWeights,
    result: SearchResult,
    grid: list[float],
) -> None:
    """Find the largest sparsity within the budget; trials that the result has already are not made again."""
    budget, folder = result.budget, run_folder(trainer)

    def cost(number: int) -> float:
        sparsity = grid[number]
        trial = result.trial(sparsity)
        if trial is None:
            pruning = at_sparsity(callback, sparsity, str(folder / "trials" / f"{sparsity:g}"))
            pruning.evaluations["dense"] = result.dense
            try:
                metrics = prune_and_evaluate(trainer, model, held_out, weights, pruning)
            except CannotSplitError as error:
                said = f"{percent(sparsity)} cannot be tried: {error}"
                if number == 1:  # larger ones were too much
                    raise ValueError(f"the budget cannot be met, {said}") from error
                rank_zero_info(said)
                return math.inf
            assert pruning.report is not None
            trial = Trial(sparsity, pruning.report.sparsity, metrics)
            result.trials.append(trial)
            _save(trainer, result, folder)
        rank_zero_info(f"trial {result.trials.index(trial) + 1}: {result.describe(trial)}")
        return budget.cost(result.dense, trial.metrics)

    without: list[Any] = [callback]
    if budget.kind == "increase":  # zero-shot tasks tell nothing of perplexity, and take long
        without += [each for each in cast(Any, trainer).callbacks if isinstance(each, ZeroShotEvaluation)]
    with with_callbacks(trainer, without=without):
        if not result.dense:
            result.dense = _dense_metrics(trainer, model, held_out, budget)
            _save(trainer, result, folder)
        number = last_within(cost, budget.limit, len(grid))
    if number == 0:
        least = result.trial(grid[1])
        assert least is not None
        raise ValueError(f"the budget cannot be met, even the smallest sparsity is too much: {result.describe(least)}")
    result.found = grid[number]
    _save(trainer, result, folder)


def _dense_metrics(trainer: Trainer, model: LightningModule, held_out: HeldOut, budget: Budget) -> dict[str, float]:
    """Evaluate the dense model; refuse a metric that is not logged, or with which nothing can be compared."""
    if budget.kind != "increase":  # the user named it
        budget.name(logged_metrics(trainer, model, held_out))
    dense = evaluate(trainer, model, held_out)
    if not math.isfinite(budget.value(dense)):
        raise ValueError(f"{budget.name(dense)} of the dense model is {budget.value(dense)}: nothing compares")
    return dense


def _begun(folder: Path, result: SearchResult, overwrite: bool) -> SearchResult:
    """Go on with the search that the folder holds, if it is this one; refuse another one.

    Where only the budget is another one, the trials are kept.
    """
    file = folder / "search.json"
    if file.exists():
        before = SearchResult.from_dict(read_json(file))
        other = other_settings(before.settings, result.settings)
        if other and not overwrite:
            raise ValueError(f"{folder} holds another search: {'; '.join(other)}. {ADVICE}")
        if not other and before.budget.is_of_size == result.budget.is_of_size:
            result.dense, result.trials = before.dense, before.trials
            if before.budget == result.budget:
                return result
    if (folder / REPORT).exists() and not overwrite:
        raise ValueError(f"{folder} holds the results of another run or of another budget. {ADVICE}")
    return result


def _save(trainer: Trainer, result: SearchResult, folder: Path) -> None:
    if trainer.is_global_zero:
        result.save(folder)


def _grid(step: float) -> list[float]:
    """List the sparsities that are tried, from 0 on: the multiples of a step."""
    step = plain(step)
    positive_up_to("step", step, 0.5, "sparsity")
    return [round(number * step, 9) for number in range(math.ceil(1 / step - 1e-9))]


def _callback(trainer: Trainer) -> PruningCallback:
    """Find the callback whose sparsity is searched for."""
    callbacks = pruning_callbacks(trainer)
    if len(callbacks) != 1:
        raise ValueError(
            f"a search chooses the sparsity of one pruning callback such as WandaPruning, got {len(callbacks)}"
        )
    if shape_callbacks(trainer):
        raise ValueError(
            "a search prunes the dense weights again and again, and their shapes have to stay: make the model smaller "
            "first, save it, and search with the saved model"
        )
    if str(callbacks[0].pattern) != "unstructured" or callbacks[0].schedule is not None:
        raise ValueError(
            "a search chooses an unstructured sparsity and prunes once: leave pattern and schedule out, "
            f"got pattern={str(callbacks[0].pattern)!r}, schedule={callbacks[0].schedule}"
        )
    return callbacks[0]
