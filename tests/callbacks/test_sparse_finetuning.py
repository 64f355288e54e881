import pytest
import torch
from test_pruning import SomebodysModule, batches, sparsities, trainer

from wanda_lightning.callbacks import SparseFinetuning
from wanda_lightning.methods import Magnitude
from wanda_lightning.pruner import prune_model
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

    class Watched(SomebodysModule):
        def configure_gradient_clipping(self, optimizer, **_):
            live = [p.grad[p != 0] if (p == 0).any() else p.grad for p in self.net.parameters()]
            norms.append(
                (
                    torch.cat([g.flatten() for g in live]).norm(),
                    torch.nn.utils.get_total_norm([p.grad for p in self.net.parameters()]),
                )
            )

    module = Watched()
    prune_model(module.net, None, Magnitude(), Unstructured(0.5))
    trainer(tmp_path, SparseFinetuning(), gradient_clip_val=1.0).fit(module, batches())
    assert len(norms) == 3
    for live, seen in norms:
        torch.testing.assert_close(live, seen, rtol=1e-5, atol=0)


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
