"""What a layer keeps for its gradients, counted by hand, and gradients without most of it."""

import torch
from helpers import tiny_llama
from torch import nn

from wanda_lightning.model.recomputing import bytes_for_gradients, recomputing


class Chain(nn.Module):
    """Three parts, each of two matrices with a square between them."""

    def __init__(self):
        super().__init__()
        for name in ("one", "two", "three"):
            setattr(self, name, Part())

    def forward(self, x):
        return self.three(self.two(self.one(x)))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x):
        return self.down(self.up(x).square())


def test_what_is_kept_is_counted():
    x, layer = torch.randn(10, 8), Chain()
    # A matrix keeps what enters it, the square too; the values have four bytes.
    assert bytes_for_gradients(layer, lambda: layer(x)) == 3 * 4 * 10 * (8 + 32 + 32)
    with recomputing(layer):
        assert bytes_for_gradients(layer, lambda: layer(x)) < 3 * 4 * 10 * 32
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert bytes_for_gradients(layer, lambda: layer(x)) == 0


def test_gradients_are_the_same():
    model, ids = tiny_llama(layers=1), torch.arange(40)[None]
    layer, forward = model.model.layers[0], model.model.layers[0].mlp.forward
    layer.mlp.forward = forward = lambda x: 2 * type(layer.mlp).forward(layer.mlp, x)  # as accelerate's hooks do
    weights = [*layer.parameters()]
    found = torch.autograd.grad(model(ids).logits.square().mean(), weights)
    calls = []
    layer.mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    with recomputing(layer):
        again = torch.autograd.grad(model(ids).logits.square().mean(), weights)
    assert len(calls) == 2
    assert all(map(torch.equal, found, again))
    assert layer.mlp.forward is forward
    assert "forward" not in vars(layer.self_attn)
