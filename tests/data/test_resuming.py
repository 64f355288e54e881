"""A run that goes on from a checkpoint ends, bit by bit, as one that was never interrupted."""

from functools import partial
from itertools import chain

import pytest
import torch
from helpers import trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from wanda_lightning import CausalLM, TextDataModule, WandaPruning
from wanda_lightning.data.resuming import ResumableLoader, ShuffledByEpoch

EPOCH = 6  # batches


def fit(model, folder, steps=2 * EPOCH - 2, ckpt_path=None, **settings) -> tuple[CausalLM, WandaPruning]:
    torch.manual_seed(0)
    module = CausalLM(
        str(model),
        optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        lr_scheduler=partial(torch.optim.lr_scheduler.LinearLR, total_iters=20),
    )
    pruning = WandaPruning(sparsity=0.5)
    saved = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        default_root_dir=folder, callbacks=[pruning, saved], max_steps=steps, limit_train_batches=EPOCH,
        limit_val_batches=0, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        **settings,
    )  # fmt: skip
    trainer.fit(module, TextDataModule(num_samples=4, sequence_length=16, batch_size=2), ckpt_path=ckpt_path)
    return module, pruning


def test_from_anywhere_in_an_epoch(tiny_model_folder, tmp_path):
    whole, expected = fit(tiny_model_folder, tmp_path / "whole")
    for step in (2, EPOCH, EPOCH + 1):  # within the first epoch, at its end, and within the second
        resumed, pruning = fit(tiny_model_folder, tmp_path / "parts", ckpt_path=tmp_path / f"whole/step={step}.ckpt")
        assert all(map(torch.equal, resumed.parameters(), whole.parameters())), step
        assert pruning.report == expected.report


@pytest.mark.slow
def test_of_two_processes(tiny_model_folder, tmp_path):
    settings = {"devices": 2, "strategy": "ddp_spawn"}
    whole, _ = fit(tiny_model_folder, tmp_path / "whole", **settings)
    for step in (2, EPOCH + 1):
        path = tmp_path / f"whole/step={step}.ckpt"
        resumed, _ = fit(tiny_model_folder, tmp_path / "parts", ckpt_path=path, **settings)
        assert all(map(torch.equal, resumed.parameters(), whole.parameters())), step


def loader() -> ResumableLoader:
    return ResumableLoader(range(10), batch_size=2, sampler=ShuffledByEpoch(range(10), seed=0))


def batches(of: ResumableLoader, epoch: int) -> list[list[int]]:
    of.sampler.set_epoch(epoch)
    return [batch.tolist() for batch in of]


def test_every_epoch_has_an_order_of_its_own():
    first, second = batches(loader(), 0), batches(loader(), 1)
    assert first != second
    assert all(sorted(chain(*order)) == list(range(10)) for order in (first, second))
    one = loader()
    assert [batches(one, 0), batches(one, 1), batches(one, 0)] == [first, second, first]


def test_what_was_taken_is_skipped_once_and_in_its_epoch_only():
    one, other = loader(), loader()
    taking = iter(one)
    next(taking), next(taking)
    state = one.state_dict()
    assert state == {"epoch": 0, "batches": 2}
    other.load_state_dict(state)
    assert batches(other, 0) == batches(loader(), 0)[2:]
    assert other.state_dict() == {"epoch": 0, "batches": 5}
    assert batches(other, 0) == batches(loader(), 0)
    other.load_state_dict(state)
    assert batches(other, 1) == batches(loader(), 1)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_the_same_batches_in_every_epoch_where_lightning_takes_its_own_sampler(tiny_model_folder, tmp_path):
    seen = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch["input_ids"].tolist())

    data = TextDataModule(num_samples=4, sequence_length=16, batch_size=2)
    fitting = trainer(tmp_path, Seen(), overfit_batches=2, max_epochs=2, max_steps=-1)
    fitting.fit(CausalLM(str(tiny_model_folder)), data)
    text = data.train_dataloader().dataset
    first = [text[row]["input_ids"].tolist() for row in range(4)]
    assert seen == [first[:2], first[2:]] * 2


def test_an_epoch_that_is_not_known_starts_from_the_beginning():
    one = ResumableLoader(range(10), batch_size=5)
    one.load_state_dict(one.state_dict() | {"batches": 2})
    assert len(list(one)) == 2
