"""Models of every kind: what is gathered is what a plain forward of the whole module shows."""

from types import SimpleNamespace

import pytest
import torch
from kinds_of_models import STACKS, build, t5, vit
from torch import nn

from wanda_lightning.calibration.batches import count, tensors_in, tensors_of
from wanda_lightning.calibration.called_stacks import called_stacks
from wanda_lightning.calibration.collector import real_inputs
from wanda_lightning.calibration.feed import Feed, _moved, call_with
from wanda_lightning.calibration.real_tokens import real_tokens
from wanda_lightning.calibration.walk import walk
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.statistics import InputNorm


def attended(attention, query, key, value, key_padding_mask=None, attn_mask=None):
    """What enters ``out_proj``, by the formula: softmax(q k^T / sqrt(d)) v."""
    if not attention.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (
        (x @ w.t() + b).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if key_padding_mask is not None:
        scores = scores + (
            key_padding_mask
            if key_padding_mask.is_floating_point()
            else torch.zeros_like(key_padding_mask, dtype=scores.dtype).masked_fill(key_padding_mask, -torch.inf)
        ).view(len(query), 1, 1, -1)
    assert attn_mask is None
    heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return heads if attention.batch_first else heads.transpose(0, 1)


def unfolded(conv, x):
    assert conv.kernel_size == conv.stride  # patches that do not overlap: cut and reshape
    n, c, h, w = x.shape
    k = conv.kernel_size[0]
    return x.reshape(n, c, h // k, k, w // k, k).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * k * k)


@pytest.mark.parametrize("kind", [torch.stack, tuple, list, lambda xs: {"input": xs[0]}])
def test_what_of_a_batch_enters_a_module(kind):
    """A tensor, the first of several, or a mapping by the names of the arguments."""
    seen, linear, batch = [], nn.Linear(3, 2), kind([torch.randn(4, 3), torch.zeros(4, 3)])
    linear.register_forward_pre_hook(lambda _, args, kwargs: seen.extend([*args, *kwargs.values()]), with_kwargs=True)
    Feed(linear).run(batch)
    first = next(tensor for _, tensor in tensors_in(batch))
    assert torch.equal(seen.pop(), first)


@torch.no_grad()
def hooked_norms(model, batches, linears):
    """The same statistic another way: hooks on every linear while the whole module runs; padding counts."""
    sums, tokens = {}, {}

    def see(name, x):
        sums[name] = sums.get(name, 0) + x.double().reshape(-1, x.shape[-1]).square().sum(0)
        tokens[name] = tokens.get(name, 0) + x.shape[:-1].numel()

    hooks = []
    for linear in linears:

        def hook(module, args, kwargs, linear=linear):
            if linear.projection is None:
                x = next(iter([*args, *kwargs.values()]))
                see(linear.name, unfolded(module, x) if isinstance(module, nn.Conv2d) else x)
                return
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            see(linear.name, named[("query", "key", "value")[linear.projection]])
            if linear.projection == 0:
                named = {n: x for n, x in named.items() if n not in ("need_weights", "is_causal")}
                see(linear.name.replace("q_proj", "out_proj"), attended(module, **named))

        hooks.append(linear.module.register_forward_pre_hook(hook, with_kwargs=True))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for batch in batches:
        call_with(model, batch)
    torch.backends.mha.set_fastpath_enabled(fast)
    for each in hooks:
        each.remove()
    return {name: total.sqrt() for name, total in sums.items()}, tokens


def without_masks(batches):
    """The same batches without padding."""
    return [
        {name: x for name, x in batch.items() if "mask" not in name} if isinstance(batch, dict) else batch
        for batch in batches
    ]


@pytest.mark.parametrize("kind", STACKS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_statistics_equal_those_of_a_plain_forward_of_the_pruned_module(kind):
    """Weights are halved as the walk goes: statistics then are those of the whole module, halved up to there."""
    model, batches = build(kind)
    batches = without_masks(batches)
    feed = Feed(model)
    with feed.calling():
        names, _ = called_stacks(feed, batches[0])
        assert names == STACKS[kind]
        layers = decoder_layers(model, layers=names)
        gathered = {}
        for step in walk(model, layers, batches, feed=feed):
            for weight in step.layer.weights.values():
                weight.mul_(0.5)
            gathered |= step.collect(InputNorm)
    expected, tokens = hooked_norms(model, batches, [linear for layer in layers for linear in layer.linears])
    assert gathered.keys() == expected.keys() > set()
    for name, statistic in gathered.items():
        assert statistic.tokens == tokens[name]
        torch.testing.assert_close(statistic.compute().double(), expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_masks_are_told_apart_by_name_where_shapes_are_alike():
    written, read = torch.eye(2, 5).bool(), torch.eye(2, 5).bool().flip(1)
    masks = {"decoder_attention_mask": written, "attention_mask": read}
    hidden, memory = torch.zeros(2, 2, 5, 8)
    assert real_tokens(masks, hidden, {}).mask_BT is read
    assert real_tokens(masks, hidden, {"encoder_hidden_states": memory}).mask_BT is written
    assert real_tokens(masks, hidden, {"encoder_hidden_states": memory}).of(memory) is read


@torch.no_grad()
def test_a_square_mask_is_laid_out_as_the_layers_are():
    """Six sequences of six tokens, once with the batch first and once with the tokens first."""
    x = torch.randn(6, 6, 32, generator=torch.Generator().manual_seed(0))
    is_padding = torch.arange(6).expand(6, 6) >= torch.tensor([6, 5, 4, 3, 2, 6])[:, None]
    gathered = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        batch = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": is_padding}
        feed = Feed(model)
        with feed.calling():
            *_, last = walk(model, decoder_layers(model, layers=["layers"]), [batch], feed=feed)
            gathered.append({name: norm.compute() for name, norm in last.collect(InputNorm).items()})
    torch.testing.assert_close(gathered[1], gathered[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "t5", "bart", "transformer_encoder", "transformer", "clip"])
@torch.no_grad()
def test_padding_does_not_count(kind):
    """The rows of a batch, each alone and without its padding, give the same; in every stack, also across two."""
    kind = next(each for each in STACKS if each.__name__ == kind)
    model, batches = build(kind)

    def cut(batch, row):
        alone = {}
        for name, x in batch.items():
            mask = next((batch[m] for m in masks_of(name, batch) if m in batch), None)
            if "mask" in name:
                continue
            real = slice(None) if mask is None or x.dim() != 2 else real_of(mask)[row]
            alone[name] = x[row : row + 1][:, real] if x.dim() == 2 else x[row : row + 1]
        return alone

    def masks_of(name, batch):
        if name.startswith(("decoder_", "tgt")):
            return ["decoder_attention_mask"]
        if name in ("labels", "pixel_values"):
            return []
        return ["attention_mask", "key_padding_mask", "src_key_padding_mask"]

    def real_of(mask):
        return ~mask if mask.dtype == torch.bool else mask != 0

    alone = [cut(batch, row) for batch in batches for row in range(2)]
    results = []
    for given in (batches, alone):
        feed = Feed(model)
        with feed.calling():
            layers = decoder_layers(model, layers=STACKS[kind])
            gathered = {}
            for step in walk(model, layers, given, feed=feed):
                gathered |= step.collect(InputNorm)
        results.append(gathered)
    padded, expected = results
    for name, statistic in padded.items():
        assert statistic.tokens == expected[name].tokens, name
        torch.testing.assert_close(statistic.compute(), expected[name].compute(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("batch", "samples", "tokens"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, 2, 6),
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.eye(3)[:2]}, 2, 2),
        ({"number": torch.tensor(7), "pixel_values": torch.ones(4, 3, 2, 2)}, 4, 0),
        ({"text": "words"}, 0, 0),
    ],
)
def test_samples_and_tokens_of_a_batch(batch, samples, tokens):
    assert count(batch) == (samples, tokens)


def test_what_lies_deep_in_a_batch_is_named_and_moved():
    batch = {"image": [torch.ones(1), {"mask": torch.ones(1)}], "text": "words"}
    assert [name for name, _ in tensors_in(batch)] == ["image.0", "image.1.mask"]
    moved = _moved({**batch, "image": tuple(batch["image"])}, torch.device("meta"))
    assert [tensor.is_meta for _, tensor in tensors_in(moved)] == [True, True]
    assert (type(moved["image"]), moved["text"]) == (tuple, "words")


def test_positions_in_an_image_are_left_out():
    """They have three dimensions; the model then finds its own."""
    ids = torch.ones(2, 3, dtype=torch.int64)
    assert [*tensors_of({"input_ids": ids, "position_ids": ids.expand(3, 2, 3), "labels": ids})] == ["input_ids"]


def test_padding_is_not_told_where_a_convolution_has_as_many_inputs_as_there_are_tokens():
    conv = SimpleNamespace(name="conv", module=nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="conv has 12 inputs for 12 tokens, and which of them are padding cannot"):
        real_inputs(torch.randn(2, 3, 2, 3), torch.ones(2, 6, dtype=torch.bool), conv)


class OfAList(nn.Sequential):
    def forward(self, values):
        return super().forward(values[0])


def test_what_cannot_be_pruned_layer_by_layer_is_refused():
    class Chain(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
            self.change = change

        def forward(self, x):
            return self.change(self.blocks, x)

    def error_of(change):
        with pytest.raises(ValueError, match="cannot be pruned layer by layer") as error:
            called_stacks(Feed(Chain(change)), torch.randn(2, 4))
        return str(error.value)

    assert "blocks: layer 1 is called where layer 0 would be next" in error_of(lambda b, x: b[0](b[1](x)))
    assert "layer 1 is not called with what the layer before it gave" in error_of(lambda b, x: b[1](2 * b[0](x)))
    assert "blocks: 1 of its 2 layers are called" in error_of(lambda b, x: b[0](x))
    albert = Chain(lambda b, x: b[1](b[0](x)))
    albert.blocks[1] = albert.blocks[0]
    assert "blocks: a layer is in it several times" in _error(albert)
    lists = Chain(lambda b, x: b[1]([b[0]([x])]))
    lists.blocks = nn.ModuleList([OfAList(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
    assert "blocks: layer 0 is not called with a tensor" in _error(lists)
    assert "no ModuleList or Sequential" in _error(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))


@torch.no_grad()
def test_lists_that_are_named_may_change_what_one_layer_gives_to_the_next():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])})
    feed = Feed(model, lambda m, x: m["blocks"][1](2 * m["blocks"][0](x)))
    assert called_stacks(feed, torch.randn(2, 4), ["blocks"])[0] == ["blocks"]


def _error(model):
    with pytest.raises(ValueError) as error:
        called_stacks(Feed(model), torch.randn(2, 4))
    return str(error.value)


class Counts(nn.Module):
    """A layer with a state of its own."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class Notes(nn.Module):
    """A layer that reads what another one has noted down, or notes down what enters it."""

    def __init__(self, notes, reads):
        super().__init__()
        self.linear, self.notes, self.reads = nn.Linear(4, 4), notes, reads

    def forward(self, x):
        if self.reads:
            return self.linear(x) + self.notes["x"]
        self.notes["x"] = x
        return self.linear(x)


@pytest.mark.parametrize(
    "layers", [lambda: [Counts(), Counts()], lambda: [Notes(notes := {}, reads=False), Notes(notes, reads=True)]]
)
@torch.no_grad()
def test_layers_that_do_not_repeat_themselves_are_refused(layers):
    model = nn.ModuleDict({"layers": nn.Sequential(*layers())})
    feed = Feed(model, lambda m, batch: m["layers"](batch))
    with pytest.raises(ValueError, match="give something else when they are called for other batches"):
        next(walk(model, decoder_layers(model, layers=["layers"]), [torch.randn(2, 4)], feed=feed))


@torch.no_grad()
def test_what_lies_behind_the_last_layer_runs_once_to_see_whether_more_are_called():
    model, batches = build(vit)
    calls = []
    model.classifier.register_forward_hook(lambda *_: calls.append(1))
    for _ in walk(model, decoder_layers(model, layers=["vit.layers"]), batches, feed=Feed(model)):
        pass
    assert len(calls) == 1


@torch.no_grad()
def test_lists_can_be_named():
    model, batches = build(t5)
    feed = Feed(model)
    with feed.calling():
        assert called_stacks(feed, batches[0], ["decoder.block"])[0] == ["decoder.block"]
        assert called_stacks(feed, batches[0], ["decoder.block", "encoder.block"])[0] == STACKS[t5]
        with pytest.raises(ValueError, match=r"no list of layers 'block'; its lists of layers: encoder\.block \(2\)"):
            called_stacks(feed, batches[0], ["block"])


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ValueError, match="must hold tensors"):
        Feed(nn.Linear(2, 2)).tensors({"text": "words"})
    with pytest.raises(ValueError, match=r"must hold tensors that are not empty.*got tensor\(\[\], size=\(0, 2\)\)"):
        Feed(nn.Linear(2, 2)).tensors(torch.empty(0, 2))


@torch.no_grad()
def test_layers_that_change_in_place_what_enters_them_are_refused():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            x += self.linear(x)
            return x

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Adds(), Adds()))
    with pytest.raises(ValueError, match="layers change in place what enters them"):
        next(walk(model, decoder_layers(model, layers=["1"]), [torch.randn(2, 4)], feed=Feed(model)))
