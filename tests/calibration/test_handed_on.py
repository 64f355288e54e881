"""Layers that hand something on to later ones: each later one is called with what is its batch's own."""

import gc
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import PrefixedDataset
from greenlet import getcurrent, greenlet
from helpers import tiny_llama, token_batches
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from wanda_lightning import InputNorm, Unstructured, Wanda, prune_model
from wanda_lightning.calibration.call_order import is_passed_on
from wanda_lightning.calibration.calls import is_the_same, split
from wanda_lightning.calibration.feed import LanguageModelFeed
from wanda_lightning.calibration.handed_on import probe
from wanda_lightning.calibration.walk import walk
from wanda_lightning.model.decoder import decoder_layers


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

    def __init__(
        self,
        first_values=False,
        previous_values=False,
        change=lambda x: x,
        between=lambda x: x,
        times=1,
        by_name=False,
    ):
        super().__init__(PretrainedConfig(vocab_size=64))
        self.first_values, self.previous_values, self.times = first_values, previous_values, times
        self.by_name = by_name
        self.change, self.between = change, between
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
            handed_on = [*map(self.change, earlier)] if self.change else []
            named = {"earlier_BTD": handed_on.pop()} if self.by_name and handed_on else {}
            out = layer(hidden_BTD, *handed_on, **named)
            hidden_BTD = self.between(out[0] if isinstance(out, tuple) else out)
            seen.append(hidden_BTD)
            values += out[1:] if isinstance(out, tuple) else []
        return self.head(hidden_BTD)


KINDS = {
    "values of the first layer": {"first_values": True},
    "values of the layer before": {"previous_values": True},
    "hidden states behind the first layer": {},
    "the same by name": {"by_name": True},
    "normed": {"change": lambda x: nn.functional.layer_norm(x, (32,))},
    "the largest": {"previous_values": True, "change": lambda x: nn.functional.one_hot(x.argmax(-1), 32).float()},
    "differences of tokens": {"change": lambda x: x - x.roll(1, 1)},
    "hidden states that are changed on their way": {"between": lambda x: 0.7 * x.roll(1, 1)},
    "nothing but what happens on their way": {"between": lambda x: 0.7 * x.roll(1, 1), "change": None},
}
BATCHES = token_batches(2, vocab=64) + token_batches(1, batch_size=1, length=7, vocab=64)


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("kind", [*KINDS.values(), {"first_values": True, "times": 2}], ids=[*KINDS, "twice"])
def test_masks_are_those_of_the_whole_models_own_inputs(kind, true_sequential):
    model, inputs = Decoder(**kind).eval(), []
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
def prune_one_after_another(model, parts, batches):
    """Run the whole model for every part, hook the linears in it, and prune them."""
    for part in parts:
        norms = {linear.name: InputNorm(32) for linear in part}
        hooks = [
            x.module.register_forward_pre_hook(lambda _, args, norm=norms[x.name]: norm.update(args[0])) for x in part
        ]
        for batch in batches:
            model(batch)
        for hook in hooks:
            hook.remove()
        for linear in part:
            Wanda().prune(linear.weight_OI, norms[linear.name], Unstructured(0.5))


def differing(one, other):
    return [n for (n, a), b in zip(one.named_parameters(), other.parameters(), strict=True) if not torch.equal(a, b)]


@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch)], ids=["language model", "any module"])
@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_pruned_layers_hand_on_enters_the_later_ones(kind, true_sequential, forward):
    ours, plain = Decoder(**KINDS[kind]).eval(), Decoder(**KINDS[kind]).eval()
    prune_model(ours, BATCHES, "wanda", 0.5, true_sequential=true_sequential, forward=forward)
    layers = decoder_layers(plain)
    parts = [[linear] for x in layers for linear in x.linears] if true_sequential else [x.linears for x in layers]
    prune_one_after_another(plain, parts, BATCHES)
    assert differing(ours, plain) == []


@pytest.mark.parametrize("activations", ["cpu", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_activations_wait_makes_no_difference(kind, activations):
    ours, plain = Decoder(**KINDS[kind]).eval(), Decoder(**KINDS[kind]).eval()
    prune_model(ours, BATCHES, "sparsegpt", 0.5, activations=activations)
    prune_model(plain, BATCHES, "sparsegpt", 0.5)
    assert differing(ours, plain) == []


@torch.no_grad()
def test_what_the_model_holds_of_activations_on_disk_is_freed_meanwhile():
    model, held = Decoder(first_values=True).eval(), []
    layers, hook = decoder_layers(model), lambda _, args: held.append(args[0])
    model.layers[2].register_forward_pre_hook(hook)
    steps = walk(model, layers, BATCHES, activations="disk")
    next(steps), next(steps), held.clear(), next(steps)
    assert [tensor.untyped_storage().nbytes() for tensor in held] == [0] * len(BATCHES)
    next(steps)
    assert [tensor.untyped_storage().nbytes() for tensor in held] == [4 * tensor.numel() for tensor in held]


@torch.no_grad()
def test_the_dense_model_hands_on_what_its_own_layers_gave():
    model, dense = Decoder(previous_values=True).eval(), Decoder(previous_values=True).eval()
    expected = [[] for _ in dense.layers]
    for layer, outputs in zip(dense.layers, expected, strict=True):
        layer.register_forward_hook(lambda _, args, out, outputs=outputs: outputs.append(out[0]))
    for batch in BATCHES:
        dense(batch)
    for step, outputs in zip(walk(model, decoder_layers(model), BATCHES, with_dense=True), expected, strict=True):
        assert all(map(torch.equal, step.dense_BTD, outputs))
        for weight in step.layer.weights.values():
            weight.mul_(0.5)


@torch.no_grad()
def test_hooks_on_layers_count_once():
    def hooked():
        model = Decoder().eval()
        model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
        model.layers[2].register_forward_hook(lambda _, args, out: out.flip(1))
        return model

    ours, plain = hooked(), hooked()
    prune_model(ours, BATCHES, "wanda", 0.5, true_sequential=False)
    prune_one_after_another(plain, [layer.linears for layer in decoder_layers(plain)], BATCHES)
    assert differing(ours, plain) == []


def test_layers_that_are_not_in_memory_are_read_once_for_all_batches(monkeypatch):
    reads, own = [], PrefixedDataset.__getitem__
    monkeypatch.setattr(PrefixedDataset, "__getitem__", lambda x, name: reads.append(x.prefix + name) or own(x, name))

    def reads_for(batches):
        reads.clear()
        prune_model(cpu_offload(Decoder(first_values=True).eval(), "cpu"), batches, "wanda", 0.5)
        return reads.count("layers.1.out.weight")

    assert reads_for(BATCHES) == reads_for(BATCHES * 3) > 0


@pytest.mark.parametrize("goes_wrong_in", [0, 2])
def test_no_run_of_the_model_waits_behind_an_error(goes_wrong_in):
    model = Decoder(first_values=True).eval()
    for step in walk(model, decoder_layers(model), BATCHES):
        if step.layer.module is model.layers[goes_wrong_in]:
            break
    waiting = [each for each in gc.get_objects() if type(each) is greenlet and each and each is not getcurrent()]
    del step
    gc.collect()
    assert (len(waiting), [bool(each) for each in waiting]) == (0, [])


@torch.no_grad()
def test_no_run_of_the_model_waits_behind_a_batch_that_is_refused():
    model = Decoder(first_values=True).eval()
    with pytest.raises(ValueError, match="input_ids must lie in") as error:
        next(walk(model, decoder_layers(model), [*BATCHES, BATCHES[0] + 64]))
    assert error.tb is not None  # which holds what was made
    waiting = [each for each in gc.get_objects() if type(each) is greenlet and each and each is not getcurrent()]
    assert len(waiting) == 0


@torch.no_grad()
def test_layers_of_models_that_hand_nothing_on_need_not_run():
    """Masks and positions are the same whatever the layers give."""
    model = tiny_llama()
    assert probe(LanguageModelFeed(model), list(model.model.layers), BATCHES[0]) is not None


def test_layers_that_are_never_called_are_refused():
    model = tiny_llama()
    model.others = nn.ModuleList([Layer(gives_more=False)])
    with pytest.raises(ValueError, match="calls 0 of its 1 decoder layers: name their list with layers"):
        prune_model(model, BATCHES, "wanda", 0.5, layers="others")


def test_layers_that_are_called_without_a_tensor_are_refused():
    with pytest.raises(ValueError, match="a layer is called without hidden states"):
        split((), {"hidden_states_of": "somewhere else"})
    assert split((), {"mask": None, "x": torch.ones(1)})[1].keyword == "x"


def test_what_has_another_data_type_is_not_what_was_passed_on():
    ones_BTD = torch.ones(1, 2, 3)
    assert is_passed_on(ones_BTD, ones_BTD.clone())
    assert not is_passed_on(ones_BTD.bfloat16(), ones_BTD)
    assert not is_passed_on(ones_BTD, ones_BTD[0])


def test_what_happens_to_hidden_states_in_some_batches_only_is_refused():
    model = Decoder(change=lambda x: None, between=lambda x: 2 * x if x.shape[1] == 7 else x).eval()
    with pytest.raises(ValueError, match="between decoder layers 0 and 1 in some batches, and not in the first"):
        prune_model(model, BATCHES, "wanda", 0.5)


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
