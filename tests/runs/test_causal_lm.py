import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import TWO_PROCESSES, loader, tiny_llama, token_batches, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.utils.data import DataLoader

from wanda_lightning.callbacks import DepthPruning, WandaPruning, WidthPruning
from wanda_lightning.checkpoints.loading import load_tokenizer
from wanda_lightning.data import TextDataModule
from wanda_lightning.runs.causal_lm import CausalLM
from wanda_lightning.runs.trainer import PruningTrainer
from wanda_lightning.training.distillation import Distillation
from wanda_lightning.training.lora import LoraSettings


def reference_perplexity(model, batches) -> float:
    """Token by token, in float64."""
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits.double()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for row, ids, real in zip(logits, batch["input_ids"], mask, strict=True):
            for t in range(1, len(ids)):
                if real[t]:
                    total -= row[t - 1].log_softmax(0)[ids[t]].item()
                    count += 1
    return torch.tensor(total / count).exp().item()


@pytest.mark.parametrize("masked", [False, True])
def test_validation_is_perplexity(tiny_model_folder, tmp_path, masked):
    module = CausalLM(str(tiny_model_folder))
    (metrics,) = trainer(tmp_path).validate(module, loader(masked), verbose=False)
    expected = reference_perplexity(module.model.eval(), list(loader(masked)))
    assert metrics["val/perplexity"] == pytest.approx(expected, rel=1e-5)
    (metrics,) = trainer(tmp_path).test(module, loader(masked), verbose=False)
    assert metrics["test/perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_that_was_broken_off_leaves_nothing(tiny_model_folder, tmp_path, stage):
    module = CausalLM(str(tiny_model_folder))
    (expected,) = getattr(trainer(tmp_path), stage)(module, loader())
    with pytest.raises(KeyError):
        getattr(trainer(tmp_path), stage)(module, DataLoader([loader().dataset[0], {}], batch_size=None))
    assert getattr(trainer(tmp_path), stage)(module, loader()) == [expected]


def test_training_lowers_the_loss_in_train_mode(tiny_model_folder, tmp_path):
    module = CausalLM(str(tiny_model_folder), optimizer=lambda params: torch.optim.AdamW(params, lr=0.01))
    modes = []
    module.on_train_batch_start = lambda *_: modes.append(module.model.training)
    (before,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    trainer(tmp_path, max_steps=20).fit(module, loader())
    (after,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert after["val/perplexity"] < 0.7 * before["val/perplexity"]
    assert set(modes) == {True}


def test_scheduler_steps_with_the_optimizer(tiny_model_folder, tmp_path):
    module = CausalLM(
        str(tiny_model_folder),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    run = trainer(tmp_path)
    run.fit(module, loader())
    assert run.optimizers[0].param_groups[0]["lr"] == 0.5**3


def test_can_be_sent_to_spawned_processes_with_its_default_optimizer():
    module = pickle.loads(pickle.dumps(CausalLM("anything")))
    optimizer = module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.AdamW, 1e-5)


def test_what_processes_trained_is_in_the_module_that_started_them(tiny_model_folder, tmp_path):
    module = CausalLM(str(tiny_model_folder))
    trainer(tmp_path, WandaPruning(0.5), ModelCheckpoint(tmp_path), **TWO_PROCESSES, enable_checkpointing=True).fit(
        module, loader()
    )
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"model.{name}"], weight) for name, weight in module.model.named_parameters())


def test_predictions_are_logits(tiny_model_folder, tmp_path):
    module = CausalLM(str(tiny_model_folder))
    predicted = torch.cat(trainer(tmp_path).predict(module, loader(masked=True)))
    with torch.no_grad():
        expected = torch.cat([module.model(**batch).logits for batch in loader(masked=True)])
    assert torch.equal(predicted, expected)


@pytest.mark.parametrize("name", ["lora", "distillation"])
def test_settings_of_another_kind_are_refused_at_once(name):
    with pytest.raises(ValueError, match=rf"{name} must be something like \w+\(.*\), got True"):
        CausalLM("anything", **{name: True})


@pytest.mark.parametrize("monitor", ["train/loss", "val/perplexity"])
def test_a_scheduler_waits_for_the_metric_that_it_names(tiny_model_folder, tmp_path, monitor):
    """With patience 0 and a rate that moves nothing, each epoch after the first is one without progress."""
    module = CausalLM(
        str(tiny_model_folder),
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-30),
        lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor, factor=0.5, patience=0, eps=0),
    )
    run = trainer(tmp_path, max_steps=-1, max_epochs=3)
    run.fit(module, loader(), loader())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-30 * 0.5**2)


def test_a_scheduler_that_names_no_metric_is_refused(tiny_model_folder, tmp_path):
    module = CausalLM(str(tiny_model_folder), lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau needs a metric.*lightning\.pytorch\.cli"):
        trainer(tmp_path).fit(module, loader(), loader())


@pytest.mark.parametrize("given", ["folder", "object"])
def test_a_tokenizer_apart_from_the_model(tmp_path, tokenizer, given):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    named = str(tmp_path / "tokenizer") if given == "folder" else tokenizer
    data = TextDataModule(tokenizer=named, sequence_length=16, num_samples=2, max_evaluation_windows=2)
    module = CausalLM(str(tmp_path / "model"))
    run = trainer(tmp_path / "out", WandaPruning(sparsity=0.5), cls=PruningTrainer)
    assert run.prune(module, data).sparsity == 0.5
    saved = load_tokenizer(str(tmp_path / "out/model"))
    assert saved("some text").input_ids == tokenizer("some text").input_ids


def test_without_a_tokenizer_only_text_is_refused(tmp_path, caplog):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{folder}.*no tokenizer.*TextDataModule\(tokenizer="):
        trainer(tmp_path, WandaPruning()).fit(CausalLM(str(folder)), TextDataModule(sequence_length=16))
    assert "goes without a tokenizer" in caplog.text
    callback = WandaPruning(sparsity=0.5, num_samples=8)
    trainer(tmp_path, callback, max_steps=1).fit(CausalLM(str(folder)), loader())
    assert callback.report.sparsity == 0.5


def test_settings_reach_the_model(tiny_model_folder):
    module = CausalLM(
        str(tiny_model_folder), dtype="bfloat16", attn_implementation="eager", gradient_checkpointing=True
    )
    module.configure_model()
    assert module.model.dtype == torch.bfloat16
    assert module.model.config._attn_implementation == "eager"
    assert module.model.is_gradient_checkpointing
    model = module.model
    module.configure_model()  # the Trainer calls it before every run
    assert module.model is model


def test_a_checkpoint_resumes(tiny_model_folder, tmp_path):
    run = trainer(tmp_path, WandaPruning(sparsity=0.5))
    module = CausalLM(str(tiny_model_folder))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed = CausalLM(str(tiny_model_folder))
    more = trainer(tmp_path, WandaPruning(sparsity=0.5), max_steps=4)
    more.fit(resumed, loader(), ckpt_path=tmp_path / "run.ckpt")
    weight = resumed.model.model.layers[0].mlp.up_proj.weight
    assert more.global_step == 4
    assert (weight == 0).float().mean() == 0.5
    assert torch.equal(weight == 0, module.model.model.layers[0].mlp.up_proj.weight == 0)


@pytest.mark.parametrize("named", [str, Path])
def test_a_checkpoint_opens_without_trainer_or_callback(tiny_model_folder, tmp_path, named):
    run = trainer(tmp_path, WandaPruning(sparsity=0.5))
    module = CausalLM(named(tiny_model_folder))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    opened = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt")
    assert all(map(torch.equal, opened.model.parameters(), module.model.parameters()))


@pytest.fixture
def smaller(tiny_model_folder, tmp_path):
    """A module that was made smaller and trained, and its checkpoint."""
    run = trainer(tmp_path, DepthPruning(layers=1), WidthPruning(keep=0.5, attention_keep=0.5))
    module = CausalLM(str(tiny_model_folder))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    return module, tmp_path / "run.ckpt"


def test_a_checkpoint_of_a_smaller_model_opens_without_trainer_or_callback(smaller):
    module, checkpoint = smaller
    opened = CausalLM.load_from_checkpoint(checkpoint)
    assert all(map(torch.equal, opened.model.parameters(), module.model.parameters()))


def test_what_was_opened_gives_what_the_smaller_model_gives(smaller):
    module, checkpoint = smaller
    opened, ids = CausalLM.load_from_checkpoint(checkpoint), token_batches()[0]
    assert torch.equal(opened.eval()(input_ids=ids).logits, module.eval()(input_ids=ids).logits)


def test_a_checkpoint_of_a_smaller_model_is_evaluated_without_callbacks(smaller, tiny_model_folder, tmp_path):
    module, checkpoint = smaller
    evaluated = CausalLM(str(tiny_model_folder))
    trainer(tmp_path).validate(evaluated, loader(), ckpt_path=checkpoint, verbose=False)
    assert all(map(torch.equal, evaluated.model.parameters(), module.model.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": tiny_llama()}, "must be a name or folder, got a LlamaForCausalLM: see prune_model"),
        ({"pretrained": None}, "got a NoneType"),
        ({"pretrained": "M", "stream": True, "lora": LoraSettings()}, "a streamed model is not trained: leave out"),
        ({"pretrained": "M", "stream": True, "distillation": Distillation()}, "a streamed model is not trained"),
        ({"pretrained": "M", "stream": True, "gradient_checkpointing": True}, "a streamed model is not trained"),
        ({"pretrained": "M", "optimizer": "adamw"}, r"optimizer must be something like partial\(AdamW.*got 'adamw'"),
    ],
)
def test_other_kinds_of_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(**arguments)


@pytest.mark.slow
@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names no .gguf file; make test-all sets it")
def test_gguf_loads_dense_and_saves(tmp_path):
    from wanda_lightning.checkpoints.saving import save_pretrained

    module = CausalLM(os.environ["SMOLLM2"])
    module.configure_model()
    assert type(module.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert module.model.dtype == torch.float32
    text = module.tokenizer("The capital of France is", return_tensors="pt")
    out = module.model.eval().generate(**text, max_new_tokens=2, do_sample=False)
    assert "Paris" in module.tokenizer.decode(out[0])
    save_pretrained(module.model, module.tokenizer, tmp_path / "model")
