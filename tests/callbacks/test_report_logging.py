"""What loggers hold after a run, read back from their files."""

import csv
import sys
from types import ModuleType

import pytest
import torch
from helpers import TWO_PROCESSES, SomebodysData, SomebodysModule, trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from wanda_lightning.callbacks import WandaPruning
from wanda_lightning.report.html.page import to_html
from wanda_lightning.runs.trainer import PruningTrainer


def prune(tmp_path, logger, **settings):
    callback = WandaPruning(sparsity=0.5, ignore=["layers.0.mlp.up_proj"])
    run = trainer(tmp_path, callback, cls=PruningTrainer, logger=logger, **settings)
    run.prune(SomebodysModule(), SomebodysData())
    return callback.report


def expected(report):
    """What every logger must hold, from the report's rows: totals by name, and layers' figures by name and layer."""
    totals = {
        "sparsity": report.sparsity,
        "pruning/whole_model_sparsity": report.whole_model_sparsity,
        "pruning/seconds/solve": report.seconds_by_phase["solve"],
        "pruning/bytes/peak_process_memory": report.memory["peak process memory"],
        "pruning/dense/val_loss": report.evaluations["dense"]["val_loss"],
        "pruning/pruned/val_loss": report.evaluations["pruned"]["val_loss"],
    }
    layers = {}
    for row in report.linears:
        layer = int(row.layer.rpartition(".")[2])
        layers[f"pruning/layer/sparsity/{row.kind}", layer] = row.sparsity
        layers[f"pruning/layer/error/{row.kind}", layer] = row.error
    assert len(layers) == 2 * (2 * 7 - 1)
    return totals, layers


def test_csv(tmp_path):
    report = prune(tmp_path, CSVLogger(tmp_path, name="csv"))
    with (tmp_path / "csv/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    totals, layers = expected(report)
    for name, value in totals.items():
        assert pytest.approx(value) in [float(row[name]) for row in rows if row[name]]
    found = {
        (name, int(row["step"])): float(value)
        for row in rows
        for name, value in row.items()
        if name.startswith("pruning/layer") and value
    }
    assert found == pytest.approx(layers)
    assert "method: Wanda(variant=False)" in (tmp_path / "csv/version_0/hparams.yaml").read_text()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = prune(tmp_path, TensorBoardLogger(tmp_path, name="tb"))
    events = EventAccumulator(str(tmp_path / "tb/version_0"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    totals, layers = expected(report)
    for name, value in totals.items():
        assert pytest.approx(value, rel=1e-5) in [event.value for event in events.Scalars(name)]
    names = [name for name in events.Tags()["scalars"] if name.startswith("pruning/layer")]
    found = {(name, event.step): event.value for name in names for event in events.Scalars(name)}
    assert found == pytest.approx(layers, rel=1e-5)
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("pruning/report/text_summary")]
    assert texts[-1] == report.to_markdown()
    assert any(b"pruning/method" in path.read_bytes() for path in tmp_path.glob("tb/version_0/events*"))


class LikeWandb(Logger):
    """The interface of Lightning's WandbLogger, without a service behind it."""

    name, version = "wandb", "0"

    def __init__(self):
        self.metrics, self.hparams, self.logged = [], {}, []

    @property
    def experiment(self):
        return self

    def log(self, data):
        self.logged.append(data)

    def log_table(self, key, columns=None, data=None, **_):
        raise AssertionError("not needed: the figures are metrics")

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params, *_):
        self.hparams |= params if isinstance(params, dict) else vars(params)


def test_wandb(tmp_path, monkeypatch):
    wandb = ModuleType("wandb")
    wandb.Html = lambda text: ("html", text)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    report = prune(tmp_path, logger := LikeWandb())
    totals, layers = expected(report)
    for name, value in totals.items():
        assert value in [metrics[name] for _, metrics in logger.metrics if name in metrics]
    found = {
        (name, step): value
        for step, metrics in logger.metrics
        for name, value in metrics.items()
        if name.startswith("pruning/layer")
    }
    assert found == layers
    assert logger.hparams["pruning"]["method"] == "Wanda(variant=False)"
    assert logger.logged[-1] == {"pruning/report": ("html", to_html(report)), "trainer/global_step": 0}


class WritesItsRank(CSVLogger):
    """Notes which process logs; Lightning's own loggers would drop what other ranks log."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("pruning/") for name in metrics):
            rank = torch.distributed.get_rank()
            with open(f"{self.root_dir}-rank-{rank}.txt", "a") as file:
                print(*metrics, file=file)


def test_only_rank_zero_logs(tmp_path):
    settings = {"max_steps": 0, **TWO_PROCESSES, "use_distributed_sampler": False}
    run = trainer(tmp_path, WandaPruning(sparsity=0.5), logger=WritesItsRank(tmp_path, name="log"), **settings)
    run.fit(SomebodysModule(), datamodule=SomebodysData())
    assert [path.name for path in tmp_path.glob("*rank*")] == ["log-rank-0.txt"]
