"""Finished layers that a callback or the Trainer keeps on disk until the model is saved, or until fit ends."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama, token_batches

from wanda_lightning.callbacks.plumbing.unfinished_layers import UnfinishedLayers
from wanda_lightning.methods.base import ScoreMethod

BATCHES = token_batches(batches=3)


class CrashError(Exception):
    pass


@pytest.fixture
def solved(monkeypatch):
    """The calls of the method's ``prune``; ``solved.limit`` is how many of them work before one crashes."""

    class Solved(list):
        limit = None

    calls, original = Solved(), ScoreMethod.prune

    def prune(self, weight_OI, statistic, pattern):
        if calls.limit is not None and len(calls) >= calls.limit:
            raise CrashError
        calls.append(tuple(weight_OI.shape))
        return original(self, weight_OI, statistic, pattern)

    monkeypatch.setattr(ScoreMethod, "prune", prune)
    return calls


def layer_files(folder) -> list[str]:
    return sorted(file.name for file in Path(folder).glob("layer-*"))


def tiny_module():
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_llama()

        def training_step(self, batch, index):
            return self.model(input_ids=batch, labels=batch).loss

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.cat(BATCHES), batch_size=2)

        calibration_dataloader = train_dataloader

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    return Module()


def trainer(folder, cls, **settings):
    from wanda_lightning.callbacks import WandaPruning

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return cls(
        callbacks=[WandaPruning(**settings)],
        default_root_dir=folder,
        max_steps=1,
        accelerator="cpu",
        enable_model_summary=False,
        **quiet,
    )


def test_a_plain_trainer_keeps_layers_until_fit_ends(tmp_path, solved):
    from lightning.pytorch import Trainer

    solved.limit = 8
    with pytest.raises(CrashError):
        trainer(tmp_path, Trainer, output_dir=str(tmp_path / "report")).fit(tiny_module())
    assert layer_files(tmp_path / "report/unfinished") == ["layer-00000.safetensors"]
    solved.limit = None
    solved.clear()
    trainer(tmp_path, Trainer, output_dir=str(tmp_path / "report")).fit(tiny_module())
    assert len(solved) == 2 * 7
    assert not (tmp_path / "report/unfinished").exists()


def test_a_fast_dev_run_leaves_them_to_the_run_that_goes_on(tmp_path, solved):
    from lightning.pytorch import Trainer

    solved.limit = 8
    with pytest.raises(CrashError):
        trainer(tmp_path, Trainer, output_dir=str(tmp_path)).fit(tiny_module())
    solved.limit = None
    trainer(tmp_path, partial(Trainer, fast_dev_run=True), output_dir=str(tmp_path)).fit(tiny_module())
    assert layer_files(tmp_path / "unfinished") == ["layer-00000.safetensors"]


def test_without_a_folder_a_plain_trainer_keeps_nothing(tmp_path, monkeypatch):
    from lightning.pytorch import Trainer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()  # somebody's
    trainer(tmp_path, Trainer).fit(tiny_module())
    assert (tmp_path / "unfinished").exists()


def test_a_trainer_that_failed_lets_others_in(tmp_path, solved):
    from wanda_lightning.runs.trainer import PruningTrainer

    solved.limit = 8
    with pytest.raises(CrashError):
        trainer(tmp_path, PruningTrainer).prune(tiny_module(), evaluate=False)
    locked = "import sys; from wanda_lightning.engine.journal import Journal; Journal(sys.argv[1]).lock()"
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", locked, tmp_path / "unfinished"], check=True, env=paths)
    solved.limit = None
    solved.clear()
    trainer(tmp_path, PruningTrainer).prune(tiny_module(), evaluate=False)
    assert len(solved) == 2 * 7
    assert not (tmp_path / "unfinished").exists()


def test_a_model_that_is_pruned_in_part_is_not_taken_for_the_dense_one(tmp_path, solved):
    from wanda_lightning.runs.trainer import PruningTrainer

    module = tiny_module()
    solved.limit = 8
    with pytest.raises(CrashError):
        trainer(tmp_path, PruningTrainer).prune(module, evaluate=False)
    solved.limit = None
    with pytest.raises(ValueError, match=r"weights: .*has to be loaded again"):
        trainer(tmp_path, PruningTrainer).prune(module, evaluate=False)


@pytest.mark.parametrize("keep", [True, False])
def test_other_processes_hear_of_a_folder_that_is_refused(keep, tmp_path, told):
    (tmp_path / "unfinished").mkdir()
    for name in ("lock", "notes.txt"):
        (tmp_path / "unfinished" / name).write_text("mine")
    with pytest.raises(ValueError, match="files of another kind"):
        UnfinishedLayers(tmp_path, keep).open(SimpleNamespace(is_global_zero=True))
    assert isinstance(told[-1], ValueError)
