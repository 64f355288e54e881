"""A pruning report in Trainer's loggers: any logger gets numbers, TensorBoard and W&B the pages too."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from wanda_lightning.model.names import number_of
from wanda_lightning.report.by_layer import by_kind, layers
from wanda_lightning.report.html.page import to_html
from wanda_lightning.report.linear_report import mean_error, mean_sparsity
from wanda_lightning.report.pruning_report import PruningReport


def log_totals(report: PruningReport, trainer: Trainer) -> None:
    """Log sparsities, and seconds and bytes of memory by phase, at the Trainer's global step."""
    totals: dict[str, float] = {
        "sparsity": report.sparsity,
        "pruning/whole_model_sparsity": report.whole_model_sparsity,
        "pruning/seconds": report.seconds,
    }
    totals |= {f"pruning/seconds/{_key(phase)}": seconds for phase, seconds in report.costs().items()}
    totals |= {f"pruning/bytes/{_key(name)}": float(size) for name, size in report.memory.items()}
    for logger in _loggers(trainer):
        logger.log_metrics(totals, step=trainer.global_step)


def log_report(report: PruningReport, trainer: Trainer) -> None:
    """Log all of a report: settings, totals, evaluations, and every kind of linear with the layer's number as the step.

    Args:
        report: What the pruning did.
        trainer: Has the loggers; only the process of rank zero logs.
    """
    log_totals(report, trainer)
    settings = {"method": report.method, "pattern": report.pattern, "target_sparsity": report.target_sparsity}
    for logger in _loggers(trainer):
        logger.log_hyperparams({"pruning": {**settings, "calibration": report.calibration}})
        for layer, metrics in _by_layer(report):
            logger.log_metrics(metrics, step=layer)
    for stage in report.evaluations:
        _log_metrics_of(report, stage, trainer)
    _log_pages(report, trainer)


def log_evaluation(report: PruningReport, stage: str, trainer: Trainer) -> None:
    """Log the metrics of one stage as ``pruning/<stage>/<metric>``, and the pages that now hold them.

    Args:
        report: The report with the evaluation in it.
        stage: Such as ``"fine-tuned"``.
        trainer: Has the loggers; only the process of rank zero logs.
    """
    _log_metrics_of(report, stage, trainer)
    _log_pages(report, trainer)


def _loggers(trainer: Trainer) -> Sequence[Logger]:
    return trainer.loggers if trainer.is_global_zero else []


def _log_metrics_of(report: PruningReport, stage: str, trainer: Trainer) -> None:
    metrics = {f"pruning/{_key(stage)}/{name}": value for name, value in report.evaluations[stage].items()}
    for logger in _loggers(trainer):
        logger.log_metrics(metrics, step=trainer.global_step)


def _by_layer(report: PruningReport) -> Iterator[tuple[int, dict[str, float]]]:
    figures = {"sparsity": by_kind(report, mean_sparsity), "error": by_kind(report, mean_error)}
    for place, layer in enumerate(layers(report)):
        metrics = {
            f"pruning/layer/{figure}/{kind}": values[place]
            for figure, series in figures.items()
            for kind, values in series.items()
        }
        number = number_of(layer)
        known = {name: value for name, value in metrics.items() if value is not None}
        if known:
            yield place if number is None else number, known


def _log_pages(report: PruningReport, trainer: Trainer) -> None:
    step = trainer.global_step
    for logger in _loggers(trainer):
        experiment = cast(Any, logger).experiment
        if hasattr(experiment, "add_text"):  # TensorBoard's writer
            experiment.add_text("pruning/report", report.to_markdown(), global_step=step)
        elif hasattr(logger, "log_table") and "wandb" in sys.modules:  # W&B has no method of Lightning's for a page
            experiment.log({"pruning/report": sys.modules["wandb"].Html(to_html(report)), "trainer/global_step": step})
        logger.save()


def _key(name: str) -> str:
    return name.replace(" ", "_")
