"""Zero is not the same as pruned: matrices that are zero by design are trained."""

import pytest
import torch
from helpers import SomebodysData, SomebodysModule, mixtral, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from wanda_lightning.callbacks import MagnitudePruning, SparseFinetuning, SparseGPTPruning, WandaPruning
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Magnitude
from wanda_lightning.runs.trainer import PruningTrainer
from wanda_lightning.sparsity import Unstructured

NEW = ("self_attn.o_proj", "mlp.down_proj")


def module_with_a_new_block() -> SomebodysModule:
    """As LLaMA-Pro expands a model: what a new block adds to the residual stream is zero."""
    module = SomebodysModule()
    with torch.no_grad():
        for name in NEW:
            module.net.model.layers[1].get_submodule(name).weight.zero_()
    return module


def new_weights(module):
    return [module.net.model.layers[1].get_submodule(name).weight for name in NEW]


def sparsity(weight) -> float:
    return float((weight == 0).float().mean())


@pytest.mark.parametrize("callback", [WandaPruning, MagnitudePruning, SparseGPTPruning])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_new_block_is_trained_at_the_sparsity_asked_for(tmp_path, caplog, callback, pattern):
    module = module_with_a_new_block()
    run = trainer(tmp_path, callback(pattern=pattern), cls=PruningTrainer, max_steps=4)
    report = run.prune(module, SomebodysData(), save=False)
    assert "pruned before" not in caplog.text
    assert next(iter(report.evaluations)) == "dense"
    run.fit(module, SomebodysData())
    assert [sparsity(weight) for weight in new_weights(module)] == [0.5, 0.5]
    if pattern == "2:4":
        assert all(((w.reshape(-1, 4) != 0).sum(1) == 2).all() for w in new_weights(module))
    assert "by design, not by pruning, are trained: those of model.layers.1.self_attn.o_proj" in caplog.text
    run.save_pretrained(module)


def test_resumed_it_goes_on_as_it_was(tmp_path):
    settings = {"enable_checkpointing": True, "max_epochs": -1}
    last = ModelCheckpoint(tmp_path, save_last=True)
    first = module_with_a_new_block()
    trainer(tmp_path, WandaPruning(sparsity=0.5), last, **settings | {"max_steps": 2}).fit(first, SomebodysData())
    zeros = [weight == 0 for weight in new_weights(first)]
    again, callback = SomebodysModule(), WandaPruning(sparsity=0.5)
    run = trainer(tmp_path, callback, max_steps=4)
    run.fit(again, SomebodysData(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.report.method == "Wanda(variant=False)"
    assert all(torch.equal(w == 0, z) for w, z in zip(new_weights(again), zeros, strict=True))


def test_rows_that_are_zero_by_design_are_trained(tmp_path):
    module = SomebodysModule()
    weight = module.net.model.layers[0].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:16] = 0
    trainer(tmp_path, WandaPruning(sparsity=0.5)).fit(module, SomebodysData())
    assert [(row == 0).sum() for row in weight] == [16] * 32


def test_a_model_that_comes_pruned_is_known_in_spite_of_them(tmp_path, caplog):
    module = module_with_a_new_block()
    prune_model(module.net, None, Magnitude(), Unstructured(0.5))
    callback = WandaPruning(sparsity=0.5)
    trainer(tmp_path, callback).fit(module, SomebodysData())
    assert "it is not pruned again" in caplog.text
    assert all(not any(row.name.endswith(f"layers.1.{n}") for n in NEW) for row in callback.report.linears)
    assert all(sparsity(weight) < 0.1 for weight in new_weights(module))


def test_sparse_finetuning_trains_them_and_names_them(tmp_path, caplog):
    module = module_with_a_new_block()
    prune_model(module.net, None, Magnitude(), Unstructured(0.5), targets=["q_proj", "gate_proj"])
    trainer(tmp_path, SparseFinetuning()).fit(module, SomebodysData())
    assert all(sparsity(weight) < 0.1 for weight in new_weights(module))
    assert sparsity(module.net.model.layers[0].self_attn.q_proj.weight) == 0.5
    assert "model.layers.1.self_attn.o_proj, model.layers.1.mlp.down_proj" in caplog.text


def test_an_expert_that_is_zero_is_told_from_the_others_in_its_parameter(tmp_path):
    module = SomebodysModule()
    module.net = mixtral()
    experts = module.net.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[1] = 0
    prune_model(module.net, None, Magnitude(), Unstructured(0.5))
    run = trainer(tmp_path, SparseFinetuning(), max_steps=6)
    data = [torch.randint(0, 64, (4, 32)) for _ in range(4)]
    run.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    assert sparsity(experts.down_proj[1]) < 0.3
    assert sparsity(experts.down_proj[0]) == 0.5


def test_sparse_finetuning_of_a_dense_model_warns(tmp_path, caplog):
    trainer(tmp_path, SparseFinetuning()).fit(SomebodysModule(), SomebodysData())
    assert "the model has no zeros to keep" in caplog.text
