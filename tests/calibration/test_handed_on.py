"""Layers that hand something on to later ones: each later one is called with what is its batch's own."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama, token_batches
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from wanda_lightning import prune_model
from wanda_lightning.calibration.calls import is_the_same
from wanda_lightning.calibration.feed import LanguageModelFeed
from wanda_lightning.calibration.handed_on import probe


class Layer(nn.Module):
    """Mixes what came before each token with what an earlier layer handed on."""

    def __init__(self, gives_more):
        super().__init__()
        self.value, self.out, self.gives_more = nn.Linear(32, 32), nn.Linear(32, 32), gives_more

    def forward(self, hidden_BTD, earlier_BTD=None):
        value_BTD = self.value(hidden_BTD)
        mixed_BTD = value_BTD if earlier_BTD is None else (value_BTD + earlier_BTD) / 2
        hidden_BTD = hidden_BTD + self.out(mixed_BTD.cumsum(1) / 5)
        return (hidden_BTD, value_BTD) if self.gives_more else hidden_BTD


class Decoder(PreTrainedModel, GenerationMixin):
    config_class = PretrainedConfig

    def __init__(self, first_values=False, previous_values=False, change=lambda x: x, times=1):
        super().__init__(PretrainedConfig(vocab_size=64))
        self.first_values, self.previous_values, self.change, self.times = first_values, previous_values, change, times
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([Layer(first_values or previous_values) for _ in range(4)])
        self.head = nn.Linear(32, 64)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden_BTD = self.embed(input_ids)
        values, seen = [], []
        for layer in [*self.layers] * self.times:
            earlier = values[:1] if self.first_values else values[-1:] if self.previous_values else seen[:1]
            out = layer(hidden_BTD, *map(self.change, earlier))
            hidden_BTD = out[0] if isinstance(out, tuple) else out
            seen.append(hidden_BTD)
            values += out[1:] if isinstance(out, tuple) else []
        return self.head(hidden_BTD)


KINDS = {
    "values of the first layer": {"first_values": True},
    "values of the layer before": {"previous_values": True},
    "hidden states behind the first layer": {},
    "normed": {"change": lambda x: nn.functional.layer_norm(x, (32,))},
    "the largest": {"previous_values": True, "change": lambda x: nn.functional.one_hot(x.argmax(-1), 32).float()},
    "differences of tokens": {"change": lambda x: x - x.roll(1, 1)},
}
BATCHES = token_batches(2, vocab=64) + token_batches(1, batch_size=1, length=7, vocab=64)


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_the_whole_models_own_inputs(kind, true_sequential):
    model, inputs = Decoder(**KINDS[kind]).eval(), []
    last = model.layers[3].out
    hook = last.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double().flatten(0, 1)))
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    hook.remove()
    score = last.weight.detach().double().abs() * torch.cat(inputs).norm(dim=0)
    lowest = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.argsort(1)[:, :16], value=True)
    prune_model(model, BATCHES, "wanda", 0.5, targets=["layers.3.out"], true_sequential=true_sequential)
    assert torch.equal(last.weight == 0, lowest)


@torch.no_grad()
def test_layers_of_models_that_hand_nothing_on_need_not_run():
    """Masks and positions are the same whatever the layers give."""
    model = tiny_llama()
    assert probe(LanguageModelFeed(model), list(model.model.layers), BATCHES[0]) is not None


def test_layers_that_are_called_twice_and_hand_something_on_are_refused():
    with pytest.raises(ValueError, match="calls decoder layer 0 where layer 4 of 4 would be next"):
        prune_model(Decoder(first_values=True, times=2).eval(), BATCHES, "wanda", 0.5)


def test_layers_that_are_never_called_are_refused():
    model = tiny_llama()
    model.others = nn.ModuleList([Layer(gives_more=False)])
    with pytest.raises(ValueError, match="calls 0 of its 1 decoder layers: name their list with layers"):
        prune_model(model, BATCHES, "wanda", 0.5, layers="others")


def test_what_is_handed_on_beside_the_arguments_is_refused():
    model, shelf = tiny_llama(), SimpleNamespace(scale=None)

    def forward(self, hidden_BTD, *args, own_forward, **kwargs):
        before, shelf.scale = shelf.scale, hidden_BTD.mean() + 1.5
        out = own_forward(hidden_BTD, *args, **kwargs)
        return out if before is None or self is model.model.layers[0] else out * before

    for layer in model.model.layers:
        layer.forward = partial(forward, layer, own_forward=layer.forward)
    with pytest.raises(ValueError, match="hand something on by other ways than arguments"):
        prune_model(model, BATCHES, "wanda", 0.5)


def test_layers_that_give_no_tensor_are_refused():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.forward = lambda hidden_BTD, **_: {"hidden_states": hidden_BTD}
    with pytest.raises(ValueError, match="a layer gives dict: only layers that give hidden states"):
        prune_model(model, BATCHES, "wanda", 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_told_from_another_result(dtype):
    """Also where one token is ten thousand times as large as the others, or some are 0."""
    hidden = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    hidden[:, 0] *= 10_000
    hidden[:, 1] = 0
    hidden = hidden.to(dtype)
    rounded = (hidden.float() * (1 + torch.finfo(dtype).eps)).to(dtype) + torch.finfo(dtype).eps ** 2
    another = torch.cat([hidden[:, :2], 1.2 * hidden[:, 2:]], 1)
    assert (is_the_same(rounded, hidden), is_the_same(another, hidden)) == (True, False)
