"""Which matrices write neurons, and which reads them; and which number of a config says how many there are."""

import copy
from typing import NamedTuple

import pytest
import torch
from helpers import mixtral, tiny_llama
from torch import nn

from wanda_lightning.model.configuration import find_numbers, set_number, shapes_of, skeleton
from wanda_lightning.model.coupling import find_neurons
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.neurons import keep_neurons


def neurons_of(model):
    with torch.no_grad():
        return find_neurons(model, decoder_layers(model, targets=["*"]))


def named(neurons):
    return neurons.reader.name, [(writer.name, layout) for writer, layout in neurons.writers]


def test_attention_has_such_shapes_too_and_is_none():
    model = tiny_llama(num_key_value_heads=4)  # all four matrices of attention are 32 by 32
    for number, (found,) in enumerate(neurons_of(model).values()):
        mlp = f"model.layers.{number}.mlp"
        assert found.name == mlp
        assert named(found) == (f"{mlp}.down_proj", [(f"{mlp}.gate_proj", "once"), (f"{mlp}.up_proj", "once")])


@pytest.mark.parametrize("error", [AssertionError, TypeError, KeyError, ZeroDivisionError])
def test_attention_may_raise_whatever_it_likes_where_its_heads_are_cut(error):
    model = tiny_llama(num_key_value_heads=4)
    expected = [named(found) for (found,) in neurons_of(model).values()]

    class Checking(type(model.model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            if self.q_proj.weight.shape[0] != 32:
                raise error
            return super().forward(*args, **kwargs)

    for layer in model.model.layers:
        layer.self_attn.__class__ = Checking
    assert [named(found) for (found,) in neurons_of(model).values()] == expected


class Angles(NamedTuple):
    cos: torch.Tensor
    sin: torch.Tensor


def test_a_model_may_pass_named_tuples_to_attention(monkeypatch):
    model = tiny_llama(num_key_value_heads=4)
    expected = [named(found) for (found,) in neurons_of(model).values()]
    rotary = model.model.rotary_emb.forward
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda *args, **kwargs: Angles(*rotary(*args, **kwargs)))
    assert [named(found) for (found,) in neurons_of(model).values()] == expected


def test_an_mlp_as_wide_as_the_hidden_states():
    found = neurons_of(tiny_llama(intermediate_size=32))
    assert [neurons.reader.name.rpartition(".")[2] for (neurons,) in found.values()] == ["down_proj"] * 3


@pytest.mark.parametrize("cached", [True, False])
def test_they_are_found_under_autocast(cached):
    """Lightning's ``bf16-mixed``; without a cache of rounded weights only wide models were told wrong."""
    model = tiny_llama(layers=2, hidden_size=576, intermediate_size=1536)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        assert len(neurons_of(model)["model.layers.0"]) == 1


def test_each_expert_has_its_own():
    for number, found in enumerate(neurons_of(mixtral()).values()):
        experts = f"model.layers.{number}.mlp.experts"
        assert [named(neurons) for neurons in found] == [
            (f"{experts}.down_proj.{expert}", [(f"{experts}.gate_up_proj.{expert}", "halves")]) for expert in range(4)
        ]


class Fused(nn.Module):
    """Gate and up in one matrix: in halves, or neuron by neuron."""

    def __init__(self, pairs: bool):
        super().__init__()
        self.pairs = pairs
        self.both, self.out = nn.Linear(32, 96), nn.Linear(48, 32)

    def forward(self, x):
        both = self.both(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.pairs else both.chunk(2, -1)
        return self.out(gate.sigmoid() * up)


@pytest.mark.parametrize("pairs", [False, True])
@torch.no_grad()
def test_what_is_fused_is_told_apart_by_trying(pairs):
    model = tiny_llama(layers=1)
    model.model.layers[0].mlp = mlp = Fused(pairs).eval()
    ((found,),) = neurons_of(model).values()
    assert [layout for _, layout in found.writers] == ["pairs" if pairs else "halves"]
    x, kept = torch.randn(5, 32), torch.tensor([0, 7, 8, 31, 47])
    mlp.out.weight[:, [j for j in range(48) if j not in kept]] = 0
    expected = mlp(x)
    keep_neurons([found], [kept])
    assert mlp.both.weight.shape == (10, 32)
    assert mlp.both.bias.shape == (10,)
    torch.testing.assert_close(mlp(x), expected)


def test_nothing_changes_while_it_is_tried():
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    neurons_of(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def narrower(model, kept: int):
    empty = skeleton(model)
    groups = [group for layer in neurons_of(model).values() for group in layer]
    modules = dict(empty.named_modules())
    twins = {module: modules[name] for name, module in model.named_modules()}
    keep_neurons([group.within(twins) for group in groups], [torch.arange(kept)] * len(groups))
    return shapes_of(empty)


def test_the_number_is_known_by_what_it_does():
    model = tiny_llama(vocab_size=64, max_position_embeddings=64)  # three numbers are 64
    config = copy.deepcopy(model.config)
    assert find_numbers(model, {64: 40}, narrower(model, 40)) == {("intermediate_size",): (64, 40)}
    assert model.config.to_dict() == config.to_dict()
    set_number(model, ("intermediate_size",), 64, 40)
    assert model.config.intermediate_size == model.model.config.intermediate_size == 40
    assert model.config.vocab_size == 64


def test_two_numbers_that_do_the_same_are_refused(monkeypatch):
    model = tiny_llama()
    wanted = narrower(model, 40)
    monkeypatch.setattr(
        "wanda_lightning.model.configuration.numbers",
        lambda config, number: iter([("intermediate_size",), ("intermediate_size",)] if number == 64 else []),
    )
    with pytest.raises(ValueError, match="LlamaConfig says 64 in intermediate_size and intermediate_size, and either"):
        find_numbers(model, {64: 40}, wanted)
