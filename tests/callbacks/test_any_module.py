"""Pruning callbacks on somebody's LightningModule around a model that is no language model."""

import copy
from dataclasses import dataclass

import pytest
import torch
from helpers import loader, tiny_llama, trainer
from huggingface_hub import ModelCard
from kinds_of_models import build, t5, transformer_encoder, vit, whisper
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from wanda_lightning import MagnitudePruning, PruningTrainer, SparseFinetuning, WandaPruning, compress, prune_model
from wanda_lightning.model.decoder import every_linear


class Theirs(LightningModule):
    """Knows nothing of pruning; its steps log, and count on what they find."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.their_batches = build(kind)
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = self.net(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append(self.net.training)
        loss = self.net(**batch).loss
        self.log("val_loss", loss)
        self.log_dict({"twice": 2 * loss})

    def train_dataloader(self):
        return DataLoader(self.their_batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.their_batches, batch_size=None)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def zeros(module, names):
    return {x.name: x.weight_OI == 0 for x in every_linear(module, ["any"]) if x.name in names}


@pytest.mark.parametrize("kind", [vit, t5, whisper], ids=lambda kind: kind.__name__)
def test_prune_fine_tune_resume(kind, tmp_path):
    module = Theirs(kind)
    plain = copy.deepcopy(module.net)
    prune_model(plain, module.their_batches, "wanda", 0.5)
    checkpoints = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1)
    callback = WandaPruning(sparsity=0.5, num_samples=4)
    run = trainer(tmp_path, callback, checkpoints, max_steps=2, enable_checkpointing=True)
    run.validate(module, verbose=False)
    run.fit(module)
    names = {row.name for row in callback.report.linears}
    pruned = zeros(plain, names)
    assert pruned.keys() == names
    after = zeros(module.net, names)
    assert all(torch.equal(after[name], mask) for name, mask in pruned.items())
    assert not torch.equal(next(module.net.parameters()), next(plain.parameters()))  # it was trained
    assert callback.report.calibration["sequences"] == 4
    assert [*callback.evaluations] == ["dense"]
    assert callback.evaluations["dense"].keys() == {"val_loss", "twice", "sparsity"}
    assert not any(module.seen)

    again = Theirs(kind)
    resumed = WandaPruning(sparsity=0.5, num_samples=4)
    run = trainer(tmp_path, resumed, max_steps=4)
    run.fit(again, ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 4
    assert resumed.report.to_dict()["linears"] == callback.report.to_dict()["linears"]
    after = zeros(again.net, names)
    assert all(torch.equal(after[name], mask) for name, mask in pruned.items())
    run.validate(again, verbose=False)
    assert [*resumed.evaluations] == ["dense", "fine-tuned"]
    assert resumed.evaluations["fine-tuned"]["sparsity"] == pytest.approx(0.5)


class Classifies(Theirs):
    """With a metric that lives from batch to batch."""

    def __init__(self):
        super().__init__(vit)
        self.accuracy = MulticlassAccuracy(2)

    def validation_step(self, batch, batch_idx):
        logits = self.net(pixel_values=batch["pixel_values"]).logits
        self.accuracy.update(logits, batch["labels"])
        self.log("val_acc", self.accuracy)


def test_the_users_metrics_are_in_the_report_and_a_copy_loads(tmp_path):
    module = Classifies()
    report = trainer(tmp_path, WandaPruning(pattern="2:4"), cls=PruningTrainer).prune(module)
    assert [*report.evaluations] == ["dense", "pruned"]
    assert all("val_acc" in metrics for metrics in report.evaluations.values())
    assert "log" not in vars(module)
    reloaded = type(module.net).from_pretrained(tmp_path / "model")
    images = module.their_batches[0]["pixel_values"]
    with torch.no_grad():
        assert torch.equal(reloaded(images).logits, module.net.eval()(images).logits)
    card = ModelCard.load(tmp_path / "model/README.md").data
    assert (card["library_name"], card.pipeline_tag) == ("transformers", None)  # it writes no text


def test_calibration_leaves_metrics_as_they_were(tmp_path):
    module = Classifies()
    module.accuracy.update(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))
    before = copy.deepcopy(module.accuracy.metric_state)
    trainer(tmp_path, WandaPruning(0.5), limit_train_batches=0, num_sanity_val_steps=0).fit(module)
    assert module.accuracy._update_count == 1
    assert all(torch.equal(module.accuracy.metric_state[name], value) for name, value in before.items())


class NamesNoIndex(Theirs):
    def validation_step(self, batch, _):
        self.log("val_loss", self.net(**batch).loss)


class ValidatesTwoLoaders(Theirs):
    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.log("val_loss", self.net(**batch).loss)

    def val_dataloader(self):
        return [super().val_dataloader(), super().val_dataloader()]


class CalibratesByItself(Theirs):
    def calibration_step(self, batch, i):
        return self.net(**batch)


@dataclass
class Texts:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class ReadsDataclasses(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = tiny_llama(layers=2)

    def calibration_step(self, batch, batch_idx):
        return self.net(batch.input_ids, batch.attention_mask)

    training_step, configure_optimizers = calibration_step, Theirs.configure_optimizers


def test_a_step_may_read_dataclasses(tmp_path):
    module, padded = ReadsDataclasses(), loader(masked=True).dataset
    plain = copy.deepcopy(module.net)
    prune_model(plain, padded, "wanda", 0.5)
    trainer(tmp_path, WandaPruning(0.5), max_steps=0).fit(
        module, DataLoader([Texts(**batch) for batch in padded], None)
    )
    assert all(map(torch.equal, module.net.parameters(), plain.parameters()))


@pytest.mark.parametrize("kind", [NamesNoIndex, ValidatesTwoLoaders, CalibratesByItself])
def test_a_step_names_its_arguments_as_it_likes(kind, tmp_path):
    module = kind(vit)
    plain = copy.deepcopy(module.net)
    prune_model(plain, module.their_batches, "wanda", 0.5)
    trainer(tmp_path, WandaPruning(0.5), max_steps=0).fit(module)
    assert all(map(torch.equal, module.net.parameters(), plain.parameters()))


class Tags(LightningModule):
    """Around a module of plain PyTorch, without a validation_step."""

    def __init__(self, own_step=False):
        super().__init__()
        self.net, self.their_batches = build(transformer_encoder)
        self.loss = nn.CrossEntropyLoss()
        if own_step:
            self.calibration_step = lambda batch, batch_idx: self.net(batch["tokens"])

    def forward(self, tokens, key_padding_mask):
        return self.net(tokens, key_padding_mask)

    def training_step(self, batch, batch_idx):
        return self.loss(self(**batch).flatten(0, 1), batch["tokens"].flatten() % 5)

    def train_dataloader(self):
        return DataLoader(self.their_batches, batch_size=None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("own_step", [False, True])
def test_a_module_of_plain_torch_is_pruned_saved_and_fine_tuned(own_step, tmp_path):
    module = Tags(own_step)
    plain = copy.deepcopy(module.net)
    forward = (lambda model, batch: model(batch["tokens"])) if own_step else None
    prune_model(plain, module.their_batches, "wanda", 0.5, forward=forward)
    run = trainer(tmp_path, WandaPruning(0.5), cls=PruningTrainer, limit_val_batches=0)
    run.prune(module, evaluate=False)
    assert all(map(torch.equal, module.net.parameters(), plain.parameters()))
    loaded = Tags()
    load_model(loaded.net, str(tmp_path / "model" / "model.safetensors"))
    card = ModelCard.load(tmp_path / "model/README.md")
    assert (card.data["library_name"], card.data.pipeline_tag) == (None, None)
    assert "`safetensors.torch.load_model` loads them" in card.text
    assert all(map(torch.equal, loaded.net.parameters(), plain.parameters()))
    trainer(tmp_path, SparseFinetuning(), max_steps=2).fit(loaded)
    names = {row.name for row in run.pruning_callback.report.linears}
    before, after = zeros(plain, names), zeros(loaded.net, names)
    assert all(torch.equal(after[name], mask) for name, mask in before.items())
    assert not torch.equal(loaded.net.head.weight, plain.head.weight)


class TagsAndValidates(Tags):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def val_dataloader(self):
        return self.train_dataloader()


def test_a_module_of_plain_torch_is_evaluated(tmp_path):
    report = trainer(tmp_path, WandaPruning(0.5), cls=PruningTrainer).prune(TagsAndValidates())
    assert {stage: [*metrics] for stage, metrics in report.evaluations.items()} == {
        "dense": ["val_loss", "sparsity"],
        "pruned": ["val_loss", "sparsity"],
    }


def test_a_module_of_plain_torch_is_pruned_to_a_size(tmp_path):
    run = trainer(tmp_path, WandaPruning(), cls=PruningTrainer)
    result = run.search(TagsAndValidates(), None, max_bytes=60_000, step=0.25)
    assert (result.dense["bytes"] > 60_000, result.found) == (True, 0.5)
    assert result.trial(0.5).metrics["bytes"] <= 60_000 < result.trial(0.25).metrics["bytes"]


def test_a_size_is_calculated_of_all_lists_that_are_pruned(tmp_path):
    """Of an encoder and a decoder: what was found is the least sparsity that fits."""
    run = trainer(tmp_path, MagnitudePruning(), cls=PruningTrainer)
    found = run.search(Theirs(t5), None, max_bytes=135_000, step=0.125).found
    less = trainer(tmp_path / "less", MagnitudePruning(found - 0.125), cls=PruningTrainer)
    less.prune(Theirs(t5), evaluate=False)
    assert compress(tmp_path / "less/model", tmp_path / "small").written > 135_000


def test_a_model_that_does_not_go_on_with_a_text_is_not_asked_to(tmp_path, tokenizer, caplog):
    module = Theirs(t5)
    module.tokenizer = tokenizer
    report = trainer(tmp_path, WandaPruning(0.5), cls=PruningTrainer).prune(module, save=False)
    assert report.samples == {}
    assert "cannot continue" not in caplog.text


def test_a_schedule_prunes_while_it_trains(tmp_path):
    from wanda_lightning import Gradual

    module = Theirs(vit)
    callback = WandaPruning(0.5, num_samples=4, schedule=Gradual(start=0, end=2, every=1))
    trainer(tmp_path, callback, max_steps=4).fit(module)
    assert callback.report.sparsity == pytest.approx(0.5)


def test_a_module_that_cannot_be_pruned_says_why(tmp_path):
    class Plain(Tags):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.their_batches = [torch.randn(2, 4)]

        def forward(self, x):
            return self.net(x)

    with pytest.raises(ValueError, match="Sequential cannot be pruned layer by layer: it has no ModuleList"):
        trainer(tmp_path, WandaPruning(0.5)).fit(Plain())


class OnlyTrains(LightningModule):
    """Its parts are called one by one, in no method that calibration could call."""

    def __init__(self):
        super().__init__()
        self.net, self.their_batches = build(transformer_encoder)

    train_dataloader, configure_optimizers = Tags.train_dataloader, Tags.configure_optimizers

    def training_step(self, batch, batch_idx):
        return self.net(batch["tokens"]).square().mean()


def test_a_module_that_only_trains_is_told_what_it_lacks(tmp_path):
    module = OnlyTrains()
    dense = copy.deepcopy(module.net)
    with pytest.raises(ValueError, match=r"OnlyTrains .* a calibration_step\(.*\), a validation_step, or a forward"):
        trainer(tmp_path, WandaPruning(0.5)).fit(module)
    assert all(map(torch.equal, module.net.parameters(), dense.parameters()))


def test_a_module_that_only_trains_is_pruned_by_what_needs_no_batches(tmp_path):
    module = OnlyTrains()
    callback = MagnitudePruning(0.5)
    trainer(tmp_path, callback).fit(module)
    assert callback.report.sparsity == 0.5
