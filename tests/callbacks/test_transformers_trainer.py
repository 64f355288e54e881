"""Zeros kept in Hugging Face's Trainer, held against a training loop written out."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama, token_batches
from torch import nn
from transformers import Trainer, TrainingArguments

from wanda_lightning import KeepZeros, prune_model

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.cat(token_batches(batches=8))]  # 16 sequences
DECAY, RATE, CLIP = 0.1, 0.01, 0.05  # the norm of gradients is larger: they are clipped


def pruned_llama():
    model = tiny_llama(layers=2)
    prune_model(model, token_batches(seed=3), "wanda", 0.5)
    return model


def zeros(model) -> dict[str, torch.Tensor]:
    return {
        name: module.weight == 0
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def train(model, folder: Path, *callbacks, resume: bool = False, **settings) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=RATE, lr_scheduler_type="constant", weight_decay=DECAY,
        max_grad_norm=CLIP, seed=0, logging_strategy="no",
        **{"max_steps": 4, "save_strategy": "no", "optim": "adamw_torch"} | settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=ROWS, callbacks=[*callbacks])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory")
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_zeros(model, before: dict[str, torch.Tensor]) -> None:
    after = zeros(model)
    assert all(torch.equal(after[name], zero_OI) for name, zero_OI in before.items())


@pytest.mark.parametrize("settings", [{"optim": "adamw_torch"}, {"optim": "sgd"}, {"optim": "adafactor"}])
def test_zeros_stay(settings, tmp_path):
    model = pruned_llama()
    before, dense = zeros(model), model.model.layers[0].mlp.up_proj.weight.detach().clone()
    train(model, tmp_path, KeepZeros(), **settings)
    assert_same_zeros(model, before)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, dense)


def test_without_it_they_go(tmp_path):
    model = pruned_llama()
    train(model, tmp_path)
    assert all(zero_OI.float().mean() < 0.1 for zero_OI in zeros(model).values())


def test_it_trains_as_a_loop_that_masks_before_it_clips(tmp_path):
    model, other = pruned_llama(), pruned_llama()
    trainer = train(model, tmp_path, KeepZeros(), max_steps=4)
    keep = [(module.weight, module.weight != 0) for n, module in other.named_modules() if n in zeros(other)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in other.parameters() if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in other.parameters() if p.dim() == 1], "weight_decay": 0},
        ],
        lr=RATE,
    )
    batches = [batch["input_ids"] for batch in trainer.get_train_dataloader()]  # the order of the first epoch
    other.train()
    for step in range(4):
        for ids_BT in batches[2 * step : 2 * step + 2]:
            (other(input_ids=ids_BT, labels=ids_BT).loss / 2).backward()
        for weight_OI, mask_OI in keep:
            weight_OI.grad.mul_(mask_OI)
        nn.utils.clip_grad_norm_(other.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight_OI, mask_OI in keep:
                weight_OI.mul_(mask_OI)
    for (name, weight), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_of_pruned_weights_may_overflow(tmp_path):
    model, other = pruned_llama(), pruned_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient.where(weight != 0, torch.inf))
    for each in (model, other):
        train(each, tmp_path, KeepZeros())
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path):
    whole, halves = pruned_llama(), pruned_llama()
    before = zeros(whole)
    train(whole, tmp_path / "whole", KeepZeros())
    train(halves, tmp_path / "halves", KeepZeros(), max_steps=2, save_strategy="steps", save_steps=2)
    resumed = tiny_llama(layers=2, seed=5)  # the checkpoint's weights replace all of it
    train(resumed, tmp_path / "halves", KeepZeros(), resume=True)
    assert_same_zeros(resumed, before)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_that_was_trained_in_half_precision_is_pruned_further(tmp_path):
    model, other = pruned_llama(), tiny_llama(layers=2)
    train(model, tmp_path, KeepZeros(), bf16=True)
    other.load_state_dict(model.state_dict())
    runs_in_half, before = model.forward, zeros(model)
    for each in (model, other):
        prune_model(each, token_batches(seed=3), "sparsegpt", 0.7)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert all((zeros(model)[name] | ~zero_OI).all() for name, zero_OI in before.items())
    assert model.forward is runs_in_half


def test_the_model_is_left_without_hooks(tmp_path):
    model = pruned_llama()
    train(model, tmp_path, KeepZeros(), max_steps=1)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


class Rude(KeepZeros):
    """Forgets to mask."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._masks.masks[0][1].data.fill_(1)


def test_a_zero_that_is_lost_is_said(tmp_path):
    with pytest.raises(RuntimeError, match=r"pruned weights of 1 linears are no longer zero \(model.layers.0"):
        train(pruned_llama(), tmp_path, Rude(), max_steps=1)


def test_a_dense_model_is_trained_with_a_warning(tmp_path, caplog):
    train(tiny_llama(layers=1), tmp_path, KeepZeros(), max_steps=1)
    assert "the model has no zeros to keep" in caplog.text
