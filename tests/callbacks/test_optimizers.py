"""Zeros kept with optimizers that wrap others, keep copies of weights, or change weights outside of their steps."""

from collections import defaultdict

import pytest
import torch
from helpers import SomebodysData, SomebodysModule, sparsities, tiny_llama, token_batches, trainer

from wanda_lightning import Gradual, SparseGPTPruning, WandaPruning, prune_model


class Lookahead(torch.optim.Optimizer):
    """Weights are drawn back to slow ones (arXiv:1907.08610); like much code for it, it leaves out super().__init__."""

    def __init__(self, params, lr):
        self.optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9)
        self.param_groups, self.defaults = self.optimizer.param_groups, self.optimizer.defaults
        self.state = defaultdict(dict)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        for weight in self.param_groups[0]["params"]:
            slow = self.state[weight].setdefault("slow", weight.clone())
            weight.copy_(slow.lerp_(weight, 0.5))
        return loss

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv:2405.15682): in evaluation weights are extrapolated from z."""

    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            share = 1 / group["steps"]
            for weight in group["params"]:
                z = self.state[weight].setdefault("z", weight.clone())
                weight.lerp_(z, share).sub_(weight.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - share)))
                z.sub_(weight.grad, alpha=group["lr"])
        return loss

    @torch.no_grad()
    def move(self, share):
        for weight, state in self.state.items():
            weight.lerp_(state["z"], share(self.param_groups[0]["beta"]))


class WithCopies(torch.optim.Optimizer):
    """Trains copies in higher precision, made before the first step or as soon as there are weights."""

    def __init__(self, params, lr, at_once):
        super().__init__(params, {"lr": lr})
        if at_once:
            self.copies()

    def copies(self):
        weights = self.param_groups[0]["params"]
        return [self.state[weight].setdefault("copy", weight.detach().double()) for weight in weights]

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for weight, copy in zip(self.param_groups[0]["params"], self.copies(), strict=True):
            weight.copy_(copy.sub_(weight.grad, alpha=self.param_groups[0]["lr"]))
        return loss


class InEvaluation(SomebodysModule):
    def on_validation_epoch_start(self):
        if not self.trainer.sanity_checking:
            self.optimizers().move(lambda beta: 1 - 1 / beta)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.optimizers().move(lambda beta: 1 - beta)


@pytest.mark.parametrize("schedule", [None, Gradual(0, 4, 2)])
def test_a_wrapper_that_begins_as_none_of_torchs(tmp_path, schedule):
    module = SomebodysModule(optimizer=Lookahead)
    run = trainer(tmp_path, WandaPruning(0.5, schedule=schedule), max_steps=4)
    run.fit(module, datamodule=SomebodysData())
    assert sparsities(module) == {0.5}
    assert "step" not in vars(run.optimizers[0])


def test_what_weights_are_extrapolated_with_follows_the_mask(tmp_path):
    class Watch(WandaPruning):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.append(sparsities(pl_module))

    seen, module = [], InEvaluation(optimizer=ScheduleFree)
    pruning = Watch(0.5, schedule=Gradual(2, 6, 2, curve="linear"))
    settings = {"max_steps": 8, "max_epochs": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    trainer(tmp_path, pruning, **settings).fit(module, datamodule=SomebodysData())
    assert seen == [{0.0}, {0.25}, {0.5}, {0.5}]


@pytest.mark.parametrize("at_once", [False, True])
def test_copies_of_weights_follow_a_pruning(tmp_path, at_once):
    module = SomebodysModule(optimizer=lambda params, lr: WithCopies(params, lr, at_once))
    trainer(tmp_path, SparseGPTPruning(0.5)).fit(module, datamodule=SomebodysData())
    expected = tiny_llama(layers=2)
    prune_model(expected, token_batches(seed=3), "sparsegpt", 0.5)
    masks = {weight: weight != 0 for name, weight in expected.named_parameters() if "_proj" in name}
    optimizer = WithCopies(expected.train().parameters(), 0.01, at_once=False)
    for ids in token_batches()[:3]:

        def masked_loss(ids=ids):
            optimizer.zero_grad()
            loss = expected(input_ids=ids, labels=ids).loss
            loss.backward()
            for weight, mask in masks.items():
                weight.grad.mul_(mask)
            return loss

        optimizer.step(masked_loss)
    assert all(map(torch.equal, module.net.parameters(), expected.parameters()))
