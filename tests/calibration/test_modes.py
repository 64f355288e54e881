"""Contexts that a model enters around its layers hold for each of them, as in a loop that runs the whole model."""

import copy

import pytest
import torch
from helpers import tiny_llama, token_batches
from test_one_pass import differing, prune_linear_by_linear
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from wanda_lightning import Unstructured, Wanda, prune_model
from wanda_lightning.calibration.modes import Modes


class Doubled(TorchFunctionMode):
    """In which activations are twice as large."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is F.silu else out


def half():
    return torch.autocast("cpu", torch.bfloat16)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden):
        return hidden + self.down(F.silu(self.up(hidden)))


class Stack(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.layers, self.context = nn.ModuleList(Layer() for _ in range(2)), context

    def forward(self, hidden):
        with self.context():
            for layer in self.layers:
                hidden = layer(hidden)
        return hidden


def within(context):
    """Let a language model enter a context in its forward."""
    model = tiny_llama()
    decode = model.model.forward

    def forward(*args, **kwargs):
        with context():
            return decode(*args, **kwargs)

    model.model.forward = forward
    return model


@pytest.mark.parametrize("context", [Doubled, half])
def test_of_a_language_model(context):
    ours, plain = within(context), within(context)
    prune_model(ours, token_batches(), Wanda(), Unstructured(0.5), true_sequential=True)
    prune_linear_by_linear(plain, token_batches(), Wanda(), Unstructured(0.5))
    assert differing(ours, plain) == []


def inputs_of(model, linear, batches):
    seen = []
    with linear.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        for batch in batches:
            model(batch)
    return torch.cat(seen)


@pytest.mark.parametrize("context", [Doubled, half])
def test_of_any_model(context):
    torch.manual_seed(0)
    ours, batches = Stack(context).to(torch.bfloat16 if context is half else None), list(torch.randn(2, 8, 16))
    plain = copy.deepcopy(ours)
    prune_model(ours, batches, Wanda(), Unstructured(0.5), forward=lambda model, batch: model(batch))
    for layer in plain.layers:
        for linear in (layer.up, layer.down):
            statistic = Wanda().statistic(linear.in_features)
            statistic.update(inputs_of(plain, linear, batches))
            Wanda().prune(linear.weight.detach(), statistic, Unstructured(0.5))
    assert differing(ours, plain) == []


def test_what_one_is_within_is_not_entered_twice():
    with Doubled():
        modes = Modes.now()
        with modes.entered():
            assert len(_get_current_function_mode_stack()) == 1


def test_afterwards_all_is_as_it_was():
    with Doubled(), half():
        modes = Modes.now()
    with modes.entered():
        pass
    assert (_get_current_function_mode_stack(), torch.is_autocast_enabled("cpu")) == ([], False)
