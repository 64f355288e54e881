"""What a pruning callback is calibrated with, from every kind of loader, and what is left for training."""

import json
import logging
from collections import OrderedDict, UserDict
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from helpers import SomebodysData, SomebodysModule, batches, tiny_llama, token_batches, trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from transformers import BatchEncoding

from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.callbacks import MagnitudePruning, WandaPruning, WidthPruning
from wanda_lightning.callbacks.plumbing.calibration_batches import _share
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.engine.width import prune_width
from wanda_lightning.methods import Wanda
from wanda_lightning.sparsity import Unstructured


class Recording(SomebodysModule):
    """Remembers what it was trained on, in order; takes batches of any shape."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += (found := [*ids_in(batch)])
        return super().training_step(found[0], batch_idx)


def ids_in(batch):
    if isinstance(batch, torch.Tensor):
        yield batch
    elif batch is not None:
        for part in batch.values() if hasattr(batch, "values") else batch:
            yield from ids_in(part)


def fit(tmp_path, loader, num_samples=4, callback=WandaPruning, **settings):
    module = Recording()
    pruning = callback(sparsity=0.5, num_samples=num_samples)
    trainer(tmp_path, pruning, **{"max_steps": -1, "max_epochs": 1} | settings).fit(module, loader)
    return module, pruning.report


def is_calibrated_with(expected, loader, tmp_path, **settings):
    """Compare all weights with those that the engine gives for these batches."""
    module, report = fit(tmp_path, loader, max_epochs=0, **settings)
    reference = tiny_llama(layers=2)
    prune_model(reference, expected, Wanda(), Unstructured(0.5))
    assert all(map(torch.equal, module.net.parameters(), reference.parameters()))
    assert report.calibration["sequences"] == sum(map(len, expected))
    assert report.calibration["tokens"] == sum(map(torch.numel, expected))
    assert {row.tokens for row in report.linears} == {report.calibration["tokens"]}


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


IDS, MORE = token_batches(seed=1), token_batches(batches=2, seed=2)  # four batches of two sequences, and two


def with_labels(ids):
    return {"input_ids": ids, "labels": ids, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize(
    "batch",
    [
        lambda ids: ids,
        lambda ids: {"input_ids": ids},
        lambda ids: OrderedDict(input_ids=ids),
        lambda ids: UserDict(input_ids=ids),
        lambda ids: BatchEncoding({"input_ids": ids}),
        with_labels,
        lambda ids: BatchEncoding(with_labels(ids)),
        lambda ids: [ids],
        lambda ids: (ids, ids),
    ],
    ids=["tensor", "dict", "OrderedDict", "UserDict", "BatchEncoding", "labels", "all", "list", "tuple"],
)
def test_any_mapping_and_sequence_is_a_batch(tmp_path, batch):
    rows = [batch(ids) for ids in IDS]
    is_calibrated_with(IDS[:2], DataLoader(rows, batch_size=None, collate_fn=lambda row: row), tmp_path)
    is_calibrated_with(IDS[:2], iter(rows), tmp_path)


def test_rows_of_tensors(tmp_path):
    is_calibrated_with(IDS[:2], DataLoader(TensorDataset(torch.cat(IDS)), batch_size=2), tmp_path)


def loader(ids):
    return DataLoader(ids, batch_size=None)


A1, A2, A3, A4 = IDS
B1, B2 = MORE


@pytest.mark.parametrize(
    ("loaders", "expected"),
    [
        (lambda: [loader(IDS), loader(MORE)], [A1, B1, A2, B2, A3, B1, A4, B2]),
        (lambda: (loader(IDS), loader(MORE)), [A1, B1, A2, B2, A3, B1, A4, B2]),
        (lambda: {"a": loader(IDS), "b": {"c": loader(MORE)}}, [A1, B1, A2, B2, A3, B1, A4, B2]),
        (lambda: CombinedLoader({"a": loader(IDS), "b": loader(MORE)}), [A1, B1, A2, B2]),
        (lambda: CombinedLoader([loader(IDS), loader(MORE)], "max_size"), [A1, B1, A2, B2, A3, A4]),
        (lambda: CombinedLoader([loader(IDS), loader(MORE)], "sequential"), [*IDS, *MORE]),
        (lambda: CombinedLoader(loader(IDS), "min_size"), IDS),
        (lambda: [iter(IDS), loader(MORE)], [A1, B1, A2, B2, A3, B1, A4, B2]),
        (lambda: CombinedLoader({"a": iter(IDS), "b": iter(MORE)}, "max_size"), [A1, B1, A2, B2, A3, A4]),
    ],
    ids=["list", "tuple", "dict", "min_size", "max_size", "sequential", "one", "streams", "streams of max_size"],
)
def test_collections_of_train_loaders(tmp_path, loaders, expected):
    is_calibrated_with(expected, loaders(), tmp_path, num_samples=1000)
    is_calibrated_with(expected[:3], loaders(), tmp_path, num_samples=6)


class Stream(IterableDataset):
    """Rows that come once, as from a socket; or anew each time."""

    def __init__(self, rows, once):
        self.rows = iter(rows) if once else rows

    def __iter__(self):
        yield from self.rows


class Reader:
    """Batches of an open file, which knows how many there are."""

    def __init__(self, rows):
        self.rows, self.number = iter(rows), len(rows)

    def __iter__(self):
        return self.rows

    def __len__(self):
        return self.number


STREAMS = {
    "generator": lambda: (ids for ids in IDS),
    "IterableDataset": lambda: DataLoader(Stream(IDS, once=False), batch_size=None),
    "IterableDataset, once": lambda: DataLoader(Stream(IDS, once=True), batch_size=None),
    "reader with a length": lambda: Reader(IDS),
}


@pytest.mark.parametrize("num_samples", [1, 4, 8, 1000])
@pytest.mark.parametrize("stream", STREAMS)
def test_training_gets_every_batch_of_a_stream_once(tmp_path, stream, num_samples):
    module, report = fit(tmp_path, STREAMS[stream](), num_samples)
    assert same(module.seen, IDS)
    assert report.calibration["sequences"] == min(8, 2 * -(-num_samples // 2))
    is_calibrated_with(IDS[: -(-num_samples // 2)], STREAMS[stream](), tmp_path, num_samples=num_samples)


def test_of_several_streams_too(tmp_path):
    module, _ = fit(tmp_path, {"a": iter(IDS), "b": iter(token_batches(seed=2))})
    assert same(module.seen, [ids for pair in zip(IDS, token_batches(seed=2), strict=True) for ids in pair])


def test_the_limit_of_training_is_not_that_of_calibration(tmp_path):
    module, report = fit(tmp_path, loader(IDS), 1000, limit_train_batches=3)
    assert same(module.seen, IDS[:3])
    assert report.calibration["sequences"] == 8
    module, report = fit(tmp_path, iter(IDS), 1000, limit_train_batches=3)
    assert same(module.seen, IDS[:3])
    assert report.calibration["sequences"] == 6  # but of a stream no more is read


def test_not_one_batch_of_a_loader_is_read_that_is_not_needed(tmp_path):
    read = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            read.append(index)
            return IDS[index]

    fit(tmp_path, DataLoader(Rows(), batch_size=None), num_samples=4, max_epochs=0)
    assert read == [0, 1]


def test_persistent_workers_are_read_from_their_first_batch(tmp_path):
    workers = DataLoader(IDS, batch_size=None, num_workers=1, persistent_workers=True)
    module, report = fit(tmp_path, workers, num_samples=4)
    assert same(module.seen, IDS)
    assert report.calibration["sequences"] == 4


TEXTS = ["".join(map(chr, row)) for ids in IDS for row in ids]


class Texts(LightningDataModule):
    """Batches of texts, of which token ids and labels are made on their way to the module."""

    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader([{"text": TEXTS[first : first + 2]} for first in range(0, len(TEXTS), 2)])

    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch["input_ids"] = torch.tensor([[ord(letter) for letter in text] for text in batch.pop("text")])
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch["attention_mask"] = (batch["input_ids"] > 20).long()
        return batch


@pytest.mark.parametrize("pruning", [WandaPruning(0.5, num_samples=4), WidthPruning(0.5, num_samples=4)])
@pytest.mark.parametrize(
    "loader",
    [lambda rows: DataLoader(rows, batch_size=None, collate_fn=lambda row: row), iter],
    ids=["loader", "stream"],
)
def test_batches_pass_through_the_hooks_of_the_datamodule(tmp_path, loader, pruning):
    module, reference = Recording(), tiny_llama(layers=2)
    pruning = deepcopy(pruning)
    trainer(tmp_path, pruning, max_steps=-1, max_epochs=0).fit(module, Texts(loader))
    expected = [{"input_ids": ids, "attention_mask": (ids > 20).long()} for ids in IDS[:2]]
    if isinstance(pruning, WidthPruning):
        prune_width(reference, expected, 0.5)
    else:
        prune_model(reference, expected, Wanda(), Unstructured(0.5))
    assert all(map(torch.equal, module.net.parameters(), reference.parameters()))


def test_no_batch_passes_through_the_hooks_twice(tmp_path):
    module = Recording()
    trainer(tmp_path, WandaPruning(sparsity=0.5, num_samples=4), max_steps=-1, max_epochs=1).fit(module, Texts(iter))
    assert same(module.seen[::2], IDS)  # each with its mask


def test_of_texts_that_never_end_no_more_is_read_than_is_asked_for(tmp_path):
    read = []

    def endless(rows):
        while len(read) < 100:
            read.append(None)
            yield {"text": rows[0]["text"]}

    trainer(tmp_path, WandaPruning(sparsity=0.5, num_samples=8), max_epochs=0).fit(Recording(), Texts(endless))
    assert len(read) < 10


def test_a_hook_may_put_the_batches_of_several_loaders_together(tmp_path):
    class Joined(SomebodysModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return torch.cat(batch)

    pruning = WandaPruning(sparsity=0.5, num_samples=1)
    trainer(tmp_path, pruning).fit(Joined(), [loader(IDS), loader(IDS)])
    assert pruning.report.calibration["sequences"] == 4


@pytest.mark.parametrize("start", [0, 2])
def test_a_schedule_keeps_what_it_read_of_a_stream(tmp_path, start):
    module = Recording()
    schedule = Gradual(start=start, end=4, every=1, initial=0.1)
    pruning = WandaPruning(sparsity=0.5, num_samples=2, schedule=schedule)
    trainer(tmp_path, pruning, max_steps=4).fit(module, iter(IDS))
    assert same(module.seen, IDS)
    assert pruning.report.calibration["sequences"] == 2
    assert pruning.report.sparsity == pytest.approx(0.5, abs=0.01)


def test_two_callbacks_read_the_same_stream(tmp_path):
    module = Recording()
    callbacks = [
        WandaPruning(sparsity=0.5, num_samples=n, targets=[target], output_dir=str(tmp_path / target))
        for n, target in ((2, "q_proj"), (6, "k_proj"))
    ]
    trainer(tmp_path, *callbacks, max_epochs=1, max_steps=-1).fit(module, iter(IDS))
    assert same(module.seen, IDS)
    assert [callback.report.calibration["sequences"] for callback in callbacks] == [2, 6]


def test_a_training_step_that_reads_a_stream_itself_is_refused(tmp_path):
    class Module(SomebodysModule):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    module = Module()
    with (
        pytest.warns(match="dataloader_iter"),
        pytest.raises(ValueError, match=r"read only once.*calibration_dataloader\(\)"),
    ):
        trainer(tmp_path, WandaPruning()).fit(module, iter(IDS))
    assert all(map(torch.equal, module.net.parameters(), tiny_llama(layers=2).parameters()))
    with pytest.warns(match="dataloader_iter"):
        trainer(tmp_path, WandaPruning()).fit(module, loader(IDS))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (lambda: loader(IDS), IDS),
        (lambda: IDS, IDS),
        (lambda: [{"input_ids": ids} for ids in IDS], IDS),
        (lambda: iter(IDS), IDS),
        (lambda: [loader(IDS), loader(MORE)], [*IDS, *MORE]),
        (lambda: {"a": loader(IDS), "b": loader(MORE)}, [*IDS, *MORE]),
        (lambda: CombinedLoader([loader(IDS), loader(MORE)], "sequential"), [*IDS, *MORE]),
        (lambda: CombinedLoader([loader(IDS), loader(MORE)], "min_size"), [A1, B1, A2, B2]),
    ],
    ids=["loader", "list", "dicts", "iterator", "loaders", "named loaders", "sequential", "min_size"],
)
def test_a_calibration_dataloader_of_ones_own(tmp_path, own, expected):
    class Data(LightningDataModule):
        calibration_dataloader = staticmethod(own)
        train_dataloader = staticmethod(batches)

    is_calibrated_with(expected, Data(), tmp_path)


def test_two_processes_share_what_is_asked_for(tmp_path):
    """Lightning gives each its own half of the train dataloader, by a DistributedSampler."""
    settings = {"max_steps": 0, "devices": 2, "strategy": "ddp_spawn"}
    rows = DataLoader(torch.cat(IDS), batch_size=2)
    trainer(tmp_path, WandaPruning(sparsity=0.5, num_samples=6), **settings).fit(SomebodysModule(), rows)
    calibration = json.loads((tmp_path / "pruning.json").read_text())["calibration"]
    assert (calibration["sequences"], calibration["tokens"]) == (8, 8 * 16)  # 3 of each, in batches of 2


@pytest.mark.parametrize("several", [lambda one: one, lambda one: [one], lambda one: CombinedLoader([one])])
def test_what_a_distributed_sampler_has_shared_is_not_shared_again(several):
    rows, seen = [*range(8)], []
    for rank in (0, 1):
        sampler = DistributedSampler(rows, num_replicas=2, rank=rank)
        own = several(DataLoader(rows, batch_size=2, sampler=sampler))
        seen += torch.cat([*_share(own, SimpleNamespace(world_size=2, global_rank=rank))]).tolist()
    assert sorted(seen) == rows


class SmallData(SomebodysData):
    def calibration_dataloader(self):
        mask = torch.ones_like(A1)
        mask[0, -5:] = 0
        return [{"input_ids": A1, "attention_mask": mask}]


@pytest.mark.parametrize(
    ("data", "callback", "said"),
    [
        (SomebodysData, {"num_samples": 8}, ("INFO", "8 sequences (128 tokens) from SomebodysData.calibr", "for 8")),
        (SmallData, {"num_samples": 8}, ("WARNING", "2 sequences (27 tokens) from SmallData.calibr", "for 8")),
        (SmallData, {"num_samples": 2}, ("INFO", "2 sequences (27 tokens) from SmallData.calibr", "for 2")),
        (batches, {"num_samples": 8}, ("INFO", "8 sequences (128 tokens) from train dataloader", "for 8")),
        (batches, {}, ("WARNING", "8 sequences (128 tokens) from train dataloader", "for 128")),
    ],
)
def test_how_much_was_used_is_said(tmp_path, caplog, data, callback, said):
    caplog.set_level(logging.INFO, "wanda_lightning")
    pruning = WandaPruning(**callback)
    trainer(tmp_path, pruning, max_steps=0).fit(SomebodysModule(), data())
    (record,) = [record for record in caplog.records if "calibrated with" in record.getMessage()]
    level, used, asked = said
    assert record.levelname == level
    assert used in record.getMessage()
    assert record.getMessage().endswith(asked)
    assert json.loads((tmp_path / "pruning.json").read_text())["calibration"] == pruning.report.calibration
    assert str(pruning.report.calibration["tokens"]) in used


def test_a_datamodule_of_an_earlier_run_is_not_that_of_this_one(tmp_path):
    """A Trainer keeps it for good."""
    module, pruning = SomebodysModule(), WandaPruning(sparsity=0.5, num_samples=4)
    run = trainer(tmp_path, pruning, max_epochs=0)
    run.validate(module, datamodule=SomebodysData(), verbose=False)
    run.fit(module, batches())
    assert pruning.report.calibration["source"] == "train dataloader"


def test_without_calibration_nothing_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "wanda_lightning")
    _, report = fit(tmp_path, loader(IDS), callback=MagnitudePruning)
    assert report.calibration == {}
    assert "calibrated" not in caplog.text
