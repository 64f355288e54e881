"""What the version before its modules were moved left on disk is still read: see version_before/README.md."""

import hashlib
import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
from helpers import trainer
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from wanda_lightning import (
    Comparison,
    PruningReport,
    PruningTrainer,
    Wanda,
    WandaPruning,
    decompress,
    inspect_model,
    load_compressed,
    load_model,
    load_tokenizer,
)
from wanda_lightning.cli.lightning_cli import run
from wanda_lightning.report.environment import installed_versions

BEFORE = Path(__file__).parent / "version_before"


def loader() -> DataLoader:
    place = torch.arange(4 * 16)
    rows = [{"input_ids": ids_T} for ids_T in ((place * place * 5 // 7 + 3 * place) % 64).view(4, 16)]
    return DataLoader(rows, batch_size=2)


class Module(LightningModule):
    """As it was when the files were written."""

    def __init__(self, folder: str = str(BEFORE / "dense")) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def calibration_dataloader(self) -> DataLoader:
        return loader()

    def train_dataloader(self) -> DataLoader:
        return loader()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Up to rounding: the files were written on another machine."""
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0)
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def digest(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The matrices that Wanda was asked to prune."""
    seen: list[tuple[int, ...]] = []
    prune = Wanda.prune

    def watched(self, weight_OI, statistic, pattern):
        seen.append(tuple(weight_OI.shape))
        return prune(self, weight_OI, statistic, pattern)

    monkeypatch.setattr(Wanda, "prune", watched)
    return seen


def test_a_checkpoint_is_gone_on_from(tmp_path, calls):
    whole, resumed = Module(), Module()
    settings = {"max_steps": 4, "max_epochs": -1}
    trainer(tmp_path / "whole", WandaPruning(sparsity=0.5, true_sequential=False), **settings).fit(whole)
    calls.clear()
    run = trainer(tmp_path / "resumed", WandaPruning(sparsity=0.5), **settings)
    run.fit(resumed, ckpt_path=BEFORE / "checkpoint" / "last.ckpt")
    assert calls == []  # it is pruned already
    assert run.callbacks[0].report.sparsity == 0.5
    assert_same(resumed, whole)


def test_an_unfinished_run_goes_on_behind_its_layers(tmp_path, calls):
    shutil.copytree(BEFORE / "interrupted", tmp_path / "interrupted")
    file = tmp_path / "interrupted" / "unfinished" / "run.json"
    written_with = json.loads(file.read_text())
    here = installed_versions("torch", "transformers", "wanda-lightning")
    file.write_text(json.dumps(written_with | here))
    module = Module()
    two_passes = {"true_sequential": False}  # there was no other way then
    callback = WandaPruning(sparsity=0.5, output_dir=str(tmp_path / "interrupted"), resume=True, **two_passes)
    trainer(tmp_path, callback, cls=PruningTrainer).prune(module, evaluate=False, save=False)
    assert len(calls) == 7  # of fourteen linears
    whole = Module()
    plain = WandaPruning(sparsity=0.5, **two_passes)
    trainer(tmp_path, plain, cls=PruningTrainer).prune(whole, evaluate=False, save=False)
    assert_same(module, whole)
    assert len(callback.report.linears) == 14
    assert callback.report.magnitudes


def test_results_are_read(tmp_path):
    report = PruningReport.from_dict(json.loads((BEFORE / "run" / "pruning.json").read_text()))
    assert report.sparsity == 0.5
    assert set(report.evaluations) == {"dense", "pruned"}
    report.save(tmp_path)
    assert PruningReport.from_dict(json.loads((tmp_path / "pruning.json").read_text())) == report
    assert "Wanda" in Comparison([BEFORE / "run"]).to_markdown()


def test_the_model_is_inspected_and_loaded():
    found = inspect_model(str(BEFORE / "run" / "model"))
    assert found.weights.sparsity == 0.5
    assert found.weights.check.loads_whole
    assert found.weights.contradictions == []
    model = load_model(str(BEFORE / "run" / "model"))
    assert load_tokenizer(str(BEFORE / "run" / "model")) is not None
    weights = load_file(BEFORE / "run" / "model" / "model.safetensors")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weights["model.layers.0.mlp.up_proj.weight"])


def test_a_compressed_model_is_restored(tmp_path):
    decompress(str(BEFORE / "compressed"), str(tmp_path / "model"))
    stored = BEFORE / "run" / "model" / "model.safetensors"
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == stored.read_bytes()
    assert digest(load_compressed(str(BEFORE / "compressed"))) == digest(load_model(str(BEFORE / "run" / "model")))


def test_the_config_of_a_run_is_a_recipe(tmp_path):
    config = (
        (BEFORE / "run" / "config.yaml").read_text().replace("pretrained: dense", f"pretrained: {BEFORE / 'dense'}")
    )
    (tmp_path / "config.yaml").write_text(config)
    two_passes = ["--trainer.callbacks.true_sequential", "false"]
    root = ["--trainer.default_root_dir", str(tmp_path / "again")]
    done = run(["prune", "-c", str(tmp_path / "config.yaml"), *root, *two_passes])
    before = json.loads((BEFORE / "run" / "pruning.json").read_text())
    assert done.trainer.pruning_callback.report.sparsity == before["sparsity"]
    if before["environment"]["python"].rpartition(".")[0] != platform.python_version().rpartition(".")[0]:
        pytest.skip("the built-in text, Python's documentation, is another one")
    again = load_file(tmp_path / "again" / "model" / "model.safetensors")
    stored = load_file(BEFORE / "run" / "model" / "model.safetensors")
    assert all(torch.equal(again[name] != 0, tensor != 0) for name, tensor in stored.items())
