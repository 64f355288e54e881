"""What methods are given to prune, against a regression on what whole models show of their linears' inputs."""

import copy

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral, token_batches
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from wanda_lightning import SparseGPT, Unstructured, Wanda, prune_model
from wanda_lightning.calibration.input_drift import InputDrift
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.methods import Magnitude
from wanda_lightning.model.decoder import decoder_layers

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": lambda: tiny_llama(layers=2, vocab_size=64),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "Gemma 3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZE, intermediate_size=64, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
    ),
    "Falcon": lambda: FalconForCausalLM(FalconConfig(**SIZE, max_position_embeddings=64)),
    "OPT": lambda: OPTForCausalLM(OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)),
}
# What reads the residual stream that a linear adds its output to. Gemma norms outputs first, Falcon adds two at once.
STREAMS = {
    "llama": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    "GPT-2": {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
    "Gemma 3": {},
    "Falcon": {},
    "OPT": {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},  # which sees (B * T, D)
}
BATCHES = token_batches(8, batch_size=4, length=12, vocab=64)


def built(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def weights(model):
    return {linear.name: linear.weight_OI.clone() for layer in decoder_layers(model) for linear in layer.linears}


def differing(one, other):
    return [n for (n, a), b in zip(one.named_parameters(), other.parameters(), strict=True) if not torch.equal(a, b)]


@torch.no_grad()
def seen_by(model, batches):
    """The first argument of every module, over all batches, in float64."""
    seen = {name: [] for name, _ in model.named_modules()}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: args and seen[name].append(args[0].double()))
        for name, module in model.named_modules()
    ]
    for batch in batches:
        model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        name: torch.cat([x.flatten(0, -2) for x in some]) for name, some in seen.items() if some and some[0].dim() > 1
    }


class Noted(Wanda):
    """Wanda that keeps what it is given."""

    def prune(self, weight_OI, statistic, pattern):
        GIVEN.append(weight_OI.clone())
        return super().prune(weight_OI, statistic, pattern)


GIVEN = []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_fitted_to_the_dense_model(family):
    dense, model = built(family), built(family)
    GIVEN.clear()
    report = prune_model(model, BATCHES, Noted(), Unstructured(0.5), dense_target=True)
    given = dict(zip([row.name for row in sorted(report.linears, key=_order_of(model))], GIVEN, strict=True))
    before, after = seen_by(dense, BATCHES), seen_by(model, BATCHES)
    assert {row.name for row in report.linears} == given.keys()
    assert sum(row.dense_target > 0.05 for row in report.linears) > len(report.linears) / 2
    for row in report.linears:
        w = weights(dense)[row.name].double()
        x, dense_x = after[row.name], before[row.name]
        wanted = (dense_x - x) @ w.t()
        if reader := STREAMS[family].get(row.name.removeprefix(f"{row.layer}.")):
            wanted += before[f"{row.layer}.{reader}"] - after[f"{row.layer}.{reader}"]
        damping_I = 0.01 * x.square().sum() / x.shape[1] + 0.3 * x.square().sum(0)
        fit = torch.linalg.solve(x.t() @ x + damping_I.diag(), x.t() @ wanted)
        expected = w + row.dense_target * fit.t()
        torch.testing.assert_close(given[row.name].double(), expected, rtol=1e-3, atol=1e-4 * float(w.abs().max()))
        wanted = x @ given[row.name].double().t()
        lost = (wanted - x @ weights(model)[row.name].double().t()).square().sum()
        assert row.error == pytest.approx(float(lost / wanted.square().sum()), rel=1e-3)  # of what was to be pruned


def _order_of(model):
    """The order in which linears are called, and so pruned."""
    calls = []
    names = {linear.module: linear.name for layer in decoder_layers(model) for linear in layer.linears}
    hooks = [m.register_forward_pre_hook(lambda m, _: calls.append(names[m])) for m in names]
    with torch.no_grad():
        model(BATCHES[0], use_cache=False)
    for hook in hooks:
        hook.remove()
    return lambda row: calls.index(row.name)


@pytest.mark.parametrize("method", [Magnitude(), SparseGPT(block_size=16)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_pruning_no_weight_changes(family, method):
    model = built(family)
    report = prune_model(model, BATCHES, method, Unstructured(0.0), dense_target=True)
    assert differing(model, built(family)) == []
    assert {row.dense_target for row in report.linears} == {0}


def test_the_first_linears_are_pruned_as_ever():
    plain, fitted = built("llama"), built("llama")
    for model, dense_target in ((plain, False), (fitted, True)):
        prune_model(model, BATCHES, SparseGPT(block_size=16), Unstructured(0.5), dense_target=dense_target)
    first = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    for name in first:  # the same tokens, summed in other parts
        torch.testing.assert_close(fitted.get_parameter(name), plain.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert len({*differing(plain, fitted)} - {*first}) == 2 * 7 - 3


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_activations_may_wait_elsewhere(place):
    here, there = built("llama"), built("llama")
    prune_model(here, BATCHES, Wanda(), Unstructured(0.5), dense_target=True)
    prune_model(there, BATCHES, Wanda(), Unstructured(0.5), dense_target=True, activations=place)
    assert differing(here, there) == []


def test_padding_does_not_count():
    padded, plain = built("llama"), built("llama")
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[:, 8:] = 0
    batches = [{"input_ids": ids.masked_fill(mask == 0, 3), "attention_mask": mask} for ids in BATCHES]
    found = prune_model(padded, batches, Wanda(), Unstructured(0.5), dense_target=True)
    wanted = prune_model(plain, [ids[:, :8] for ids in BATCHES], Wanda(), Unstructured(0.5), dense_target=True)
    for one, other in zip(found.linears, wanted.linears, strict=True):
        assert one.dense_target == pytest.approx(other.dense_target, abs=1e-3)
        assert one.tokens == other.tokens


def test_experts_are_pruned_as_they_are():
    report = prune_model(tiny_mixtral(), BATCHES, Wanda(), Unstructured(0.5), dense_target=True)
    assert {row.dense_target for row in report.linears if ".experts." in row.name} == {None}
    assert all(row.dense_target is not None for row in report.linears if ".self_attn." in row.name)


def test_half_precision_and_reconstruction():
    model = built("llama").bfloat16()
    settings = {"dense_target": True, "reconstruction": Reconstruction(epochs=1)}
    report = prune_model(model, BATCHES, SparseGPT(block_size=16), Unstructured(0.5), **settings)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert max(row.dense_target for row in report.linears) > 0.1


def test_the_hidden_states_come_closer_to_the_dense_ones():
    dense = tiny_llama(layers=4, vocab_size=64)
    batches = token_batches(16, batch_size=8, length=16, vocab=64)
    fresh = token_batches(2, batch_size=8, length=16, vocab=64, seed=99)
    errors = []
    for dense_target in (False, True):
        model = copy.deepcopy(dense)
        prune_model(model, batches, SparseGPT(block_size=16), Unstructured(0.5), dense_target=dense_target)
        errors.append((seen_by(model, fresh)["model.norm"] - seen_by(dense, fresh)["model.norm"]).square().sum())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        (BATCHES, {"true_sequential": False}, "dense_target needs one pass"),
        (BATCHES[:1], {}, "dense_target needs at least 2 calibration batches"),
        (None, {}, "^dense_target needs calibration batches, got None"),
    ],
)
def test_refused_before_a_weight_changes(batches, settings, message):
    model = built("llama")
    with pytest.raises(ValueError, match=message):
        prune_model(model, batches, Magnitude(), Unstructured(0.5), dense_target=True, **settings)
    assert differing(model, built("llama")) == []


def test_refused_where_one_pass_does_not_fit(monkeypatch):
    model = built("llama")
    monkeypatch.setattr("wanda_lightning.engine.order.free_memory", lambda device: 1)
    with pytest.raises(ValueError, match="dense_target needs one pass, and one pass holds"):
        prune_model(model, BATCHES, Wanda(), Unstructured(0.5), dense_target=True)
    assert differing(model, built("llama")) == []


def test_a_hopeless_fit_leaves_the_layer_as_it_was(monkeypatch):
    def hopeless(*_):
        raise torch.linalg.LinAlgError("hopeless")

    model = built("llama")
    monkeypatch.setattr(InputDrift, "target", hopeless)
    with pytest.raises(ValueError, match=r"q_proj cannot be fitted to the dense model: hopeless"):
        prune_model(model, BATCHES, Wanda(), Unstructured(0.5), dense_target=True)
    assert differing(model, built("llama")) == []


def test_refused_for_weights_that_are_shared():
    model = built("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ValueError, match="leave dense_target out"):
        prune_model(model, BATCHES, Wanda(), Unstructured(0.5), dense_target=True)
