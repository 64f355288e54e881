from pathlib import Path

import pytest
import torch
from helpers import tiny_llama, token_batches
from torch import nn
from transformers import BartConfig, BartForCausalLM, MambaConfig, MambaForCausalLM

from wanda_lightning.calibration.feed import LanguageModelFeed
from wanda_lightning.calibration.hidden_states import HiddenStates
from wanda_lightning.calibration.walk import walk
from wanda_lightning.calibration.weight_products import WeightProducts
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Wanda
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.sparsity import Unstructured
from wanda_lightning.statistics import InputNorm


def padded(batch: torch.Tensor, pad: int, side: str) -> dict[str, torch.Tensor]:
    """Give the second half of a batch ``pad`` tokens of padding."""
    mask = torch.ones_like(batch)
    half = slice(len(batch) // 2, None)
    mask[half, :pad] = 0
    if side == "right":
        mask = mask.flip(1)
    return {"input_ids": batch.masked_fill(mask == 0, 0), "attention_mask": mask}


@torch.no_grad()
def layer_outputs(model, batches):
    """What the last decoder layer gives in the model's own forward."""
    outputs = []
    hook = model.model.layers[-1].register_forward_hook(lambda _, args, out: outputs.append(out))
    for batch in batches:
        model(**(batch if isinstance(batch, dict) else {"input_ids": batch}))
    hook.remove()
    return outputs


@pytest.mark.parametrize("side", [None, "left", "right"])
@torch.no_grad()
def test_walk_gives_the_models_own_hidden_states_and_logits(llama, batches, side):
    if side:
        batches = [padded(batch, 1 + i, side) for i, batch in enumerate(batches)]
    expected = layer_outputs(llama, batches)
    *_, last = walk(llama, decoder_layers(llama), batches)
    outputs = list(last.outputs())
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    batch = batches[0] if isinstance(batches[0], dict) else {"input_ids": batches[0]}
    assert torch.equal(llama.lm_head(llama.model.norm(outputs[0])), llama(**batch).logits)


@torch.no_grad()
def test_changes_to_a_layer_show_in_the_next(llama, batches):
    layers = decoder_layers(llama)
    for step in walk(llama, layers, batches):
        for linear in step.layer.linears:
            linear.weight_OI.mul_(0.5)
    expected = layer_outputs(llama, batches)
    assert all(torch.equal(a, b) for a, b in zip(step.outputs(), expected, strict=True))


def hooked_norms(model, batches):
    """The same statistic another way: hooks on every linear in the model's own forward."""
    sums = {}
    hooks = [
        linear.module.register_forward_pre_hook(
            lambda _, args, name=linear.name: sums.setdefault(name, []).append(args[0].double())
        )
        for layer in decoder_layers(model)
        for linear in layer.linears
    ]
    for batch in batches:
        model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).norm(dim=0) for name, xs in sums.items()}


@torch.no_grad()
def test_statistics_equal_those_of_a_plain_forward(llama, batches):
    expected = hooked_norms(llama, batches)
    for step in walk(llama, decoder_layers(llama), batches):
        for name, norm in step.collect(InputNorm).items():
            torch.testing.assert_close(norm.compute().double(), expected.pop(name), rtol=1e-5, atol=0)
            assert norm.tokens == 4 * 2 * 16
    assert not expected


@torch.no_grad()
def test_linears_fed_by_the_same_tensor_share_a_statistic(llama, batches):
    step = next(iter(walk(llama, decoder_layers(llama), batches)))
    statistics = {name.rpartition(".")[2]: s for name, s in step.collect(InputNorm).items()}
    assert statistics["q_proj"] is statistics["k_proj"] is statistics["v_proj"]
    assert statistics["gate_proj"] is statistics["up_proj"]
    assert len({id(s) for s in statistics.values()}) == 4


@torch.no_grad()
def test_the_statistics_pass_stops_at_the_last_linear(llama, batches):
    outputs = []
    hook = llama.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: outputs.append(1))
    next(iter(walk(llama, decoder_layers(llama), batches))).collect(InputNorm)
    hook.remove()
    # Before that a few tokens go, as test_each_layer_runs_once has it; and once to learn which linear is the last.
    assert len(outputs) == 4 + 1


class Chunked(nn.Module):
    """Calls its first linear once for every 16 tokens, and last."""

    def __init__(self):
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden):
        up = self.up_proj(hidden)
        return torch.cat([self.down_proj(chunk) for chunk in up.split(16, dim=1)], dim=1)


@torch.no_grad()
def test_no_input_is_missed_where_calls_vary_with_the_shape(llama):
    for layer in llama.model.layers:
        layer.mlp = Chunked()
    batches = token_batches(2, length=16) + token_batches(2, length=48) + token_batches(2, length=16)
    expected = hooked_norms(llama, batches)
    for step in walk(llama, decoder_layers(llama), batches):
        for name, norm in step.collect(InputNorm).items():
            assert norm.tokens == 2 * (4 * 16 + 2 * 48)
            torch.testing.assert_close(norm.compute().double(), expected[name], rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_linear_that_is_called_twice_sees_both_inputs(llama, batches):
    mlp = llama.model.layers[0].mlp
    mlp.forward = lambda hidden: mlp.down_proj(mlp.up_proj(mlp.down_proj(mlp.gate_proj(hidden))))
    expected = hooked_norms(llama, batches)
    for name, norm in next(iter(walk(llama, decoder_layers(llama), batches))).collect(InputNorm).items():
        torch.testing.assert_close(norm.compute().double(), expected[name], rtol=1e-5, atol=0)
        assert norm.tokens == 4 * 2 * 16 * (2 if "down_proj" in name else 1)


class Unpacked(nn.ModuleList):
    """Layers whose outputs the model takes apart, as some models do by themselves."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return [lambda *args, _layer=layer, **kwargs: _layer(*args, **kwargs)[0] for layer in found]


@pytest.mark.parametrize("kind", [tuple, list])
@torch.no_grad()
def test_layers_may_return_tuples_and_lists(batches, kind):
    expected = layer_outputs(tiny_llama(), batches)
    model = tiny_llama()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: kind((out, None)) if isinstance(out, torch.Tensor) else out)
    layers = decoder_layers(model)
    model.model.layers = Unpacked(model.model.layers)
    *_, last = walk(model, layers, batches)
    assert all(map(torch.equal, last.outputs(), expected))


def test_models_that_use_their_layers_in_another_way_are_refused(batches):
    def error_of(change):
        model = tiny_llama()
        change(model.model)
        with pytest.raises(ValueError) as error:
            next(iter(walk(model, decoder_layers(model), batches)))
        return str(error.value)

    def halved(decoder):
        decoder.config.num_hidden_layers = 2

    def in_place(decoder):
        for layer in decoder.layers:
            layer.forward = lambda hidden, *_, mlp=layer.mlp, **__: hidden.add_(mlp(hidden))

    assert "calls 2 of its 3 decoder layers" in error_of(halved)
    assert "layers change in place what enters them" in error_of(in_place)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_does_not_count(llama, side):
    (batch,) = token_batches(1, batch_size=2, length=12)
    for step in walk(llama, decoder_layers(llama), [padded(batch, 5, side)]):
        with_padding = step.collect(InputNorm)
    assert {s.tokens for s in with_padding.values()} == {12 + 7}
    if side == "right":  # causal: what comes before the padding does not know of it
        alone = [batch[:1], batch[1:, :7]]
        for step in walk(llama, decoder_layers(llama), alone):
            expected = step.collect(InputNorm)
        for name, statistic in with_padding.items():
            torch.testing.assert_close(statistic.compute(), expected[name].compute(), rtol=1e-4, atol=1e-5)


def test_texts_that_are_packed_in_one_row_do_not_see_each_other(batches):
    """Positions that begin anew say where the next text does, as in transformers' DataCollatorWithFlattening."""
    one, packed = tiny_llama(), tiny_llama()
    rows = [batches[0][0], batches[1][0][:9], batches[2][1][:12]]
    row = {"input_ids": torch.cat(rows)[None], "position_ids": torch.cat([torch.arange(len(x)) for x in rows])[None]}
    prune_model(one, [row[None] for row in rows], Wanda(), Unstructured(0.5))
    prune_model(packed, [row], Wanda(), Unstructured(0.5))
    differ = sum((a != b).sum().item() for a, b in zip(one.parameters(), packed.parameters(), strict=True))
    assert differ <= 4  # attention sums in another order


@torch.no_grad()
def test_batch_size_does_not_matter(llama):
    (batch,) = token_batches(1, batch_size=6)
    results = []
    for split in ([batch], list(batch.split(1)), list(batch.split(4))):
        for step in walk(llama, decoder_layers(llama), split):
            norms = step.collect(InputNorm)
        results.append(torch.cat([n.compute() for n in norms.values()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_layers_are_left_with_their_own_forward(llama, batches):
    marker = llama.model.layers[1].forward = lambda *a, _f=llama.model.layers[1].forward, **k: _f(*a, **k)
    for _ in walk(llama, decoder_layers(llama), batches):
        pass
    assert llama.model.layers[1].__dict__["forward"] is marker
    assert "forward" not in llama.model.layers[0].__dict__


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(1, 200, dtype=torch.long), "200 tokens, the model takes at most 128"),
        (torch.zeros(16, dtype=torch.long), r"int32 of shape \(B, T\), got a torch.int64 tensor of shape \(16,\)"),
        (torch.zeros(1, 16), r"int64 or int32 of shape \(B, T\), got a torch.float32 tensor"),
        (torch.ones(1, 16, dtype=torch.bool), r"int32 of shape \(B, T\), got a torch.bool tensor"),
        (torch.ones(1, 16, dtype=torch.int16), r"int32 of shape \(B, T\), got a torch.int16 tensor"),
        ({"tokens": torch.zeros(1, 16, dtype=torch.long)}, r"got None under the keys \['tokens'\]"),
        ("text", "got 'text'"),
        ([], r"got \[\]"),
        (torch.full((1, 16), 300), r"input_ids must lie in \[0, 300\).*got 300 to 300"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 5)}, r"got \(1, 5\)"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": [[1, 1]]}, r"attention_mask .* got \[\[1, 1\]\]"),
        ({"input_ids": torch.ones(1, 2).long(), "position_ids": [[0, 1]]}, r"position_ids .* got \[\[0, 1\]\]"),
    ],
)
@torch.no_grad()
def test_bad_batches_are_refused(llama, batch, message):
    with pytest.raises(ValueError, match=message):
        next(iter(walk(llama, decoder_layers(llama), [batch])))


@torch.no_grad()
def test_empty_calibration_sets_are_refused(llama):
    with pytest.raises(ValueError, match="the calibration set is empty: at least one batch is needed"):
        next(iter(walk(llama, decoder_layers(llama), [])))
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="holds padding only"):
        next(iter(walk(llama, decoder_layers(llama), [{"input_ids": ids, "attention_mask": ids}])))


@torch.no_grad()
def test_infinite_activations_name_the_layer_before_the_first_visit(batches):
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the activations of model\.layers\.1 are NaN or infinite"):
        next(walk(model, decoder_layers(model), batches))


@torch.no_grad()
def test_infinite_activations_of_a_later_batch_name_the_linear(batches):
    model = tiny_llama()
    model.model.embed_tokens.weight[299] = torch.inf
    batches[-1][0, 3] = 299
    step = next(walk(model, decoder_layers(model), batches))
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.0\.self_attn\.q_proj are NaN or infinite"):
        step.collect(InputNorm)


@pytest.mark.parametrize("place", [0, 60])
@torch.no_grad()
def test_what_only_one_token_overflows_in_float16_is_found_before_the_first_visit(place):
    model = tiny_llama().half()
    first, second = model.model.layers[:2]
    model.model.embed_tokens.weight[:, 0] = 0
    model.model.embed_tokens.weight[299] = torch.eye(32)[0]
    for writer in (first.self_attn.o_proj, first.mlp.down_proj, second.self_attn.o_proj):
        writer.weight[0] = 0  # so that this token alone has anything in the first channel
    for reader in (second.mlp.gate_proj, second.mlp.up_proj):
        reader.weight[:, 0] = 1e4
    ids = torch.randint(0, 299, (2, 64))
    next(walk(model, decoder_layers(model), [ids]))
    ids[0, place] = 299
    with pytest.raises(ValueError, match=r"the activations of model\.layers\.1 are NaN or infinite"):
        next(walk(model, decoder_layers(model), [ids]))


@pytest.mark.parametrize(
    ("dtype", "padding", "tokens"), [("float32", False, 32), ("float32", True, 64), ("float16", False, 64)]
)
def test_a_few_tokens_show_whether_a_float32_overflows(dtype, padding, tokens):
    ids = torch.ones(3, 64, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids} if padding else ids
    feed = LanguageModelFeed(tiny_llama().to(getattr(torch, dtype)))
    assert {tensor.shape for tensor in feed.first(batch).values()} == {(1, tokens)}
    with torch.autocast("cpu", torch.float16):
        assert {tensor.shape for tensor in feed.first(batch).values()} == {(1, 64)}


@torch.no_grad()
def test_batches_may_be_tuples(llama, batches):
    expected = [
        n.compute() for n in next(iter(walk(llama, decoder_layers(llama), batches))).collect(InputNorm).values()
    ]
    tuples = [(batch, batch + 1) for batch in batches]
    given = [n.compute() for n in next(iter(walk(llama, decoder_layers(llama), tuples))).collect(InputNorm).values()]
    assert all(map(torch.equal, given, expected))


@pytest.mark.parametrize("ignore", [None, ["encoder_attn.*"]])
def test_a_decoder_of_an_encoder_decoder_says_what_is_not_called(ignore, batches):
    """Its cross-attention waits for an encoder: more samples would not help."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=300, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BartForCausalLM(config).eval()
    before = [parameter.clone() for parameter in model.parameters()]
    if ignore:
        report = prune_model(model, batches, Wanda(), Unstructured(0.5), ignore=["*encoder_attn*"])
        assert report.sparsity == 0.5
        return
    with pytest.raises(ValueError, match=r"does not call .*layers\.0\.encoder_attn\.k_proj.*with ignore") as error:
        prune_model(model, batches, Wanda(), Unstructured(0.5))
    assert "samples" not in str(error.value)
    assert all(map(torch.equal, model.parameters(), before))


@torch.no_grad()
def test_a_weight_that_is_used_without_a_call_is_calibrated(batches):
    """Mamba's ``dt_proj`` takes the first features that ``x_proj`` gives."""
    rank = 6
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=rank)
    model = MambaForCausalLM(config).eval()
    given = []
    hook = model.backbone.layers[0].mixer.x_proj.register_forward_hook(lambda _, args, out: given.append(out))
    for batch in batches:
        model(batch)
    hook.remove()
    norm = torch.cat([out[..., :rank].flatten(0, 1) for out in given]).norm(dim=0)
    first = next(iter(walk(model, decoder_layers(model), batches)))
    torch.testing.assert_close(first.collect(InputNorm)["backbone.layers.0.mixer.dt_proj"].compute(), norm)
    report = prune_model(model, batches, Wanda(), Unstructured(0.5))
    assert {row.sparsity for row in report.linears if row.name.endswith("dt_proj")} == {0.5}


@pytest.mark.parametrize(
    "product",
    [
        torch.matmul,
        lambda weight, x: weight @ x,
        lambda weight, x: torch.matmul(weight, other=x),
        lambda weight, x: torch.matmul(input=weight, other=x),
    ],
)
def test_products_with_a_weight_are_seen_however_they_are_written(product):
    linear, x, seen = nn.Linear(4, 3), torch.randn(2, 5, 4), []
    with torch.no_grad(), WeightProducts([linear], lambda module, inputs: seen.append((module, inputs))):
        product(x, x.mT)
        product(linear.weight, x.mT)
    ((module, inputs),) = seen
    assert module is linear
    assert torch.equal(inputs, x)


def test_what_waits_on_disk_is_deleted_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states, batch_BTD = HiddenStates("disk"), torch.randn(1, 2, 3)
    states.append(batch_BTD)
    assert torch.equal(states[0], batch_BTD)
    assert len([*tmp_path.glob("*/*")]) == 1
    del states
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full device of Linux")
def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states = HiddenStates("disk")
    (folder,) = tmp_path.iterdir()
    (folder / "0.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"cannot wait in {folder}: .*Errno 28.* No space left .* let TMPDIR name"):
        states.append(torch.randn(1, 2, 3))
