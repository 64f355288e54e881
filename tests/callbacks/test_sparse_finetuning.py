import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import TWO_PROCESSES, SomebodysModule, batches, sparsities, tiny_llama, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision

from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.callbacks import SparseFinetuning, SparseGPTPruning, WandaPruning
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Magnitude
from wanda_lightning.runs.trainer import PruningTrainer
from wanda_lightning.sparsity import SemiStructured, Unstructured


def pruned_module(**settings):
    module = SomebodysModule(**settings)
    prune_model(module.net, None, Magnitude(), SemiStructured(2, 4))
    return module


def test_a_model_pruned_before_keeps_its_zeros(tmp_path):
    module = pruned_module()
    zeros = [weight == 0 for weight in module.net.parameters()]
    trainer(tmp_path, SparseFinetuning()).fit(module, batches())
    assert sparsities(module) == {0.5}
    assert all(not weight[zero].any() for weight, zero in zip(module.net.parameters(), zeros, strict=True))


def test_without_it_the_zeros_are_lost(tmp_path):
    module = pruned_module()
    trainer(tmp_path).fit(module, batches())
    assert max(sparsities(module)) < 0.01


def test_a_linear_left_dense_trains_freely(tmp_path):
    module = SomebodysModule()
    prune_model(module.net, None, Magnitude(), Unstructured(0.5), ignore=["q_proj"])
    before = module.net.model.layers[0].self_attn.q_proj.weight.clone()
    trainer(tmp_path, SparseFinetuning()).fit(module, batches())
    assert sparsities(module) == {0.0, 0.5}
    assert (module.net.model.layers[0].self_attn.q_proj.weight != before).all()


def test_clipping_sees_the_norm_of_live_gradients_only(tmp_path):
    norms = []

    class HashedBatches(SomebodysModule):
        def configure_gradient_clipping(self, optimizer, **_):
            live = [p.grad[p != 0] if (p == 0).any() else p.grad for p in self.net.parameters()]
            norms.append(
                (
                    torch.cat([g.flatten() for g in live]).norm(),
                    torch.nn.utils.get_total_norm([p.grad for p in self.net.parameters()]),
                )
            )

    module = HashedBatches()
    prune_model(module.net, None, Magnitude(), Unstructured(0.5))
    trainer(tmp_path, SparseFinetuning(), gradient_clip_val=1.0).fit(module, batches())
    assert len(norms) == 3
    for live, seen in norms:
        torch.testing.assert_close(live, seen, rtol=1e-5, atol=0)


def test_a_module_that_steps_by_itself_clips_the_norm_of_live_gradients_only(tmp_path):
    norms = []

    class Manual(SomebodysModule):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.net(input_ids=batch, labels=batch).loss)
            self.clip_gradients(optimizer, 0.1, "norm")
            norms.append(torch.cat([p.grad[p != 0] for p in self.net.parameters()]).norm().item())
            optimizer.step()

    trainer(tmp_path, WandaPruning(sparsity=0.7)).fit(Manual(automatic=False), batches())
    assert norms == pytest.approx([0.1] * 3)


def test_weights_changed_behind_its_back_are_an_error(tmp_path):
    class Meddling(SomebodysModule):
        def on_train_batch_end(self, *_):
            with torch.no_grad():
                self.net.model.layers[1].mlp.up_proj.weight.fill_(1.0)

    module = Meddling()
    prune_model(module.net, None, Magnitude(), Unstructured(0.5))
    with pytest.raises(RuntimeError, match=r"no longer zero \(model\.layers\.1\.mlp\.up_proj"):
        trainer(tmp_path, SparseFinetuning()).fit(module, batches())


def test_hooks_are_gone_afterwards(tmp_path):
    module = pruned_module()
    run = trainer(tmp_path, SparseFinetuning())
    run.fit(module, batches())
    optimizer = run.optimizers[0]
    assert not optimizer._optimizer_step_post_hooks


def test_nothing_is_left_of_a_run_that_failed(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise InterruptedError

    callback = WandaPruning(sparsity=0.5)
    run = trainer(tmp_path, callback, Fails())
    with pytest.raises(InterruptedError):
        run.fit(SomebodysModule(), batches())
    assert not run.optimizers[0]._optimizer_step_post_hooks
    assert pickle.loads(pickle.dumps(callback)).report == callback.report


def test_a_copy_is_made_while_it_works(tmp_path):
    copies = []

    class Copies(Callback):
        def on_train_batch_start(self, *_):
            copies.append(pickle.loads(pickle.dumps(callback)))

    module, callback = SomebodysModule(), WandaPruning(sparsity=0.5)
    trainer(tmp_path, callback, Copies()).fit(module, batches())
    assert [copy.report.sparsity for copy in copies] == [0.5] * 3
    assert sparsities(module) == {0.5}  # the hooks are still where they were


def late_average(step: int):
    """An average that starts late: until then it holds what the module was before it was pruned."""
    return EMAWeightAveraging(decay=0.5, update_starting_at_step=step)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: WeightAveraging(),
        lambda: late_average(5),
        lambda: late_average(100),  # never
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    ],
    ids=["ema", "average", "late", "never", "swa"],
)
def test_averaged_weights_keep_the_zeros(tmp_path, average, first):
    module, validated = SomebodysModule(), []

    class HashedBatches(Callback):
        def on_validation_end(self, trainer, pl_module):
            validated.append(sparsities(pl_module))

    callbacks = [average(), WandaPruning(sparsity=0.5)]
    checkpoints = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    settings = {"max_steps": -1, "max_epochs": 3, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    run = trainer(tmp_path, *(callbacks if first else callbacks[::-1]), checkpoints, HashedBatches(), **settings)
    run.fit(module, batches(), batches(2))
    assert sparsities(module) == {0.5}
    assert validated == [{0.5}] * 3
    saved = torch.load(checkpoints.best_model_path, weights_only=True)["state_dict"]
    fresh = SomebodysModule()
    fresh.load_state_dict(saved)
    assert sparsities(fresh) == {0.5}


@pytest.mark.parametrize("schedule", [None, Gradual(0, 3, 1, regrow=True)], ids=str)
def test_an_average_that_has_not_begun_is_the_pruned_weights(tmp_path, schedule):
    """SparseGPT changes the kept weights too. Nothing is trained: the average must not change any loss."""

    def losses(*callbacks):
        found = []

        class Notes(Callback):
            def on_validation_end(self, trainer, *_):
                found.append(trainer.callback_metrics["val_loss"].item())

        module = SomebodysModule(optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=0.0))
        pruning = SparseGPTPruning(sparsity=0.5, schedule=schedule)
        trainer(tmp_path, pruning, *callbacks, Notes(), max_steps=4).fit(module, batches(), batches(2))
        return found

    assert losses(late_average(100)) == losses()


def test_pruning_more_does_not_begin_an_average_anew(tmp_path):
    """This average stays what it was first: the weights after one step."""
    heads = []

    class Notes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            heads.append(pl_module.net.lm_head.weight.clone())

    module, pruning = SomebodysModule(), WandaPruning(sparsity=0.5, schedule=Gradual(0, 3, 1))
    trainer(tmp_path, pruning, EMAWeightAveraging(decay=1.0), Notes()).fit(module, batches())
    assert torch.equal(module.net.lm_head.weight, heads[0])


def test_an_average_of_nothing_is_told(tmp_path, caplog):
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    run = trainer(tmp_path, swa, WandaPruning(sparsity=0.5), max_steps=-1, max_epochs=2)
    run.fit(SomebodysModule(lazy=True), batches())
    assert "averages nothing" in caplog.text


def test_gradient_checkpointing(tmp_path):
    plain, module = pruned_module(), pruned_module()
    module.net.gradient_checkpointing_enable()
    module.net.train()
    plain.net.train()
    for each in (plain, module):
        trainer(tmp_path, SparseFinetuning()).fit(each, batches())
    assert sparsities(module) == {0.5}
    assert module.net.is_gradient_checkpointing
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("part", ["module", "model", "layers"])
def test_a_compiled_model(tmp_path, part):
    module = SomebodysModule()
    compile_ = partial(torch.compile, backend="eager")  # inductor would take a minute
    if part == "model":
        module.net = compile_(module.net)
    elif part == "layers":
        for index, layer in enumerate(module.net.model.layers):
            module.net.model.layers[index] = compile_(layer)
    run = trainer(tmp_path, WandaPruning(sparsity=0.5))
    run.fit(compile_(module) if part == "module" else module, batches())
    linears = [m for n, m in module.net.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    assert {(m.weight == 0).float().mean().item() for m in linears} == {0.5}


def test_float16_with_a_gradient_scaler(tmp_path):
    """Lightning turns 16-mixed into bf16-mixed on a CPU unless the plugin is given."""

    class HashedBatches(SomebodysModule):
        def on_before_optimizer_step(self, optimizer):
            scales.append(scaler.get_scale())

    scales, module = [], HashedBatches()
    before = [p.clone() for p in module.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows: the first steps are skipped
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    trainer(tmp_path, WandaPruning(sparsity=0.5), plugins=[precision], max_steps=40, max_epochs=-1).fit(
        module, batches()
    )
    assert sparsities(module) == {0.5}
    assert scales[0] == 2.0**40
    assert scales[-1] < scales[0]
    assert not all(map(torch.equal, module.parameters(), before))
    assert all(p.isfinite().all() for p in module.parameters())


def test_steps_of_the_bare_optimizer_keep_the_zeros_too(tmp_path):
    class Manual(SomebodysModule):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.net(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    module = Manual(automatic=False)
    before = tiny_llama(layers=2)
    trainer(tmp_path, WandaPruning(sparsity=0.5), max_steps=-1, max_epochs=1).fit(module, batches())
    assert sparsities(module) == {0.5}
    assert not torch.equal(module.net.lm_head.weight, before.lm_head.weight)


def test_no_checkpoint_without_the_zeros_is_written(tmp_path):
    class Meddler(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                pl_module.net.model.layers[0].mlp.down_proj.weight.add_(1.0)

    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1)
    run = trainer(tmp_path, SparseFinetuning(), Meddler(), checkpoints, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match=r"no longer zero \(model\.layers\.0\.mlp\.down_proj"):
        run.fit(pruned_module(), batches())
    assert run.global_step == 1
    assert not list(tmp_path.rglob("*.ckpt"))


def test_no_model_without_the_zeros_is_saved(tmp_path):
    module = SomebodysModule()
    run = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer)
    run.fit(module, batches())
    with torch.no_grad():
        module.net.model.layers[1].self_attn.v_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"no longer zero \(model\.layers\.1\.self_attn\.v_proj"):
        run.save_pretrained(module)
    assert not (tmp_path / "model").exists()


def test_resuming_takes_up_the_masks_as_they_were(tmp_path):
    module, callback = SomebodysModule(), WandaPruning(sparsity=0.5)
    run = trainer(tmp_path, callback)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed, second = SomebodysModule(), WandaPruning(sparsity=0.5)
    trainer(tmp_path, second, max_steps=4).fit(resumed, batches(), ckpt_path=tmp_path / "run.ckpt")
    before, after = ({name: mask for name, _, mask in c._masks.masks} for c in (callback, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_processes_keep_the_zeros(tmp_path):
    """DDP with gloo: what comes back has the zeros of the pruned model, and is trained."""
    module = pruned_module()
    zeros = [weight == 0 for weight in module.net.parameters()]
    before = [weight.clone() for weight in module.net.parameters()]
    settings = {**TWO_PROCESSES, "use_distributed_sampler": False}
    trainer(tmp_path, SparseFinetuning(), **settings).fit(module, batches())
    assert all(not weight[zero].any() for weight, zero in zip(module.net.parameters(), zeros, strict=True))
    assert sparsities(module) == {0.5}
    assert not any(map(torch.equal, module.net.parameters(), before))


@pytest.mark.slow
def test_sharded_weights_keep_the_zeros(tmp_path):
    """FSDP2 on a CPU: two processes, started by Lightning from a script of its own."""
    script = Path(__file__).parent / "sharded.py"
    out = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert "sparsities {0.5}, trained True" in out.stdout
