"""One matrix under several names is pruned once; contradicting wishes are refused with both names."""

import pytest
import torch
from helpers import tiny_llama, tiny_zamba2, token_batches
from safetensors.torch import save_file
from torch import nn

from wanda_lightning import ATP, InputNorm, Magnitude, SemiStructured, SparseGPT, Unstructured, Wanda, prune_model
from wanda_lightning.allocation.selection import Selection
from wanda_lightning.engine.measured_sparsity import report_as_found, sparsity_now
from wanda_lightning.export.bitmask import compressed_file_size
from wanda_lightning.export.size import CompressedSize

FIRST, AGAIN = "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"


def shared(how: str = "parameter"):
    model = tiny_llama(layers=3)
    first, again = model.get_submodule(FIRST), model.get_submodule(AGAIN)
    if how == "parameter":
        again.weight = first.weight
    elif how == "memory":  # two parameters over one storage
        again.weight = nn.Parameter(first.weight.data)
    elif how == "module":
        model.model.layers[2].mlp.up_proj = first
    return model


@pytest.mark.parametrize("how", ["parameter", "memory", "module"])
@pytest.mark.parametrize("method", [Wanda(), SparseGPT(block_size=16), Magnitude()], ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)], ids=str)
def test_it_is_pruned_once_and_reported_under_both_names(how, method, pattern):
    model = shared(how)
    report = prune_model(model, token_batches(), method, pattern)
    rows = {row.name: row for row in report.linears}
    assert len(rows) == len(report.linears) == 3 * 7
    for name in (FIRST, AGAIN):
        assert rows[name].sparsity == (model.get_submodule(name).weight == 0).double().mean() == 0.5
        assert name.startswith(f"{rows[name].layer}.")
    # As if the second layer were not there: later layers do not touch the matrix.
    alone = tiny_llama(layers=3)
    prune_model(alone, token_batches(), method, pattern)
    assert torch.equal(model.get_submodule(FIRST).weight, alone.get_submodule(FIRST).weight)


@pytest.mark.parametrize("how", ["parameter", "memory", "module"])
@pytest.mark.parametrize(
    "wishes",
    [
        {"allocation": {"model.layers.2.*": 0.7}},
        {"allocation": {"model.layers.1.*": "2:4"}},
        {"ignore": [AGAIN]},
        {"ignore": [FIRST]},
        {"targets": ["model.layers.1.*"]},
    ],
    ids=str,
)
def test_contradictions_name_both(how, wishes):
    model = shared(how)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"layers\.[12]\.mlp\.up_proj .*layers\.[12]\.mlp\.up_proj"):
        prune_model(model, token_batches(), Wanda(), Unstructured(0.5), **wishes)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("wishes", [{"ignore": ["up_proj"]}, {"allocation": {"up_proj": 0.25}}], ids=str)
def test_wishes_that_agree_are_followed(wishes):
    model = shared()
    report = prune_model(model, token_batches(), Wanda(), Unstructured(0.5), **wishes)
    wanted = 0.0 if "ignore" in wishes else 0.25
    assert (model.get_submodule(FIRST).weight == 0).double().mean() == wanted
    assert {row.name for row in report.linears if "up_proj" in row.name} == (
        set() if "ignore" in wishes else {f"model.layers.{i}.mlp.up_proj" for i in range(3)}
    )


def test_two_linears_of_one_layer():
    model = tiny_llama(layers=2)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    report = prune_model(model, token_batches(), Wanda(), Unstructured(0.5))
    assert {row.sparsity for row in report.linears} == {0.5}
    assert len(report.linears) == 14


@pytest.mark.parametrize("adapter", [0, 1])
@torch.no_grad()
def test_a_part_of_a_shared_block_is_pruned_where_it_is_called(adapter):
    model, batches, name = tiny_zamba2(), token_batches(vocab=64), f"gate_up_proj_adapter_list.{adapter}.0"
    linear = model.get_submodule(f"model.layers.{[1, 3][adapter]}.shared_transformer.feed_forward.{name}")
    expected, norm = linear.weight.clone(), InputNorm(32)
    hook = linear.register_forward_pre_hook(lambda _, args: norm.update(args[0]))
    for ids in batches:
        model(ids)
    hook.remove()
    Wanda().prune(expected, norm, Unstructured(0.5))
    report = prune_model(model, iter(batches), Wanda(), Unstructured(0.5), targets=[name])
    assert {row.tokens for row in report.linears} == {norm.tokens}
    assert torch.equal(linear.weight, expected)


def test_embeddings_are_never_pruned_by_way_of_a_linear():
    model = tiny_llama(layers=2, vocab_size=64)  # as wide as the MLP: (64, 32) fits both
    model.model.layers[0].mlp.up_proj.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"up_proj shares its weight with model\.embed_tokens\.weight"):
        prune_model(model, token_batches(vocab=64), Wanda(), Unstructured(0.5))


def with_a_shared_mlp():
    """Two of three layers have one MLP."""
    model = tiny_llama(layers=3, hidden_size=64, intermediate_size=256)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    return model


def zeros_of_each_matrix(model):
    weights = [weight for name, weight in model.named_parameters() if "_proj" in name]  # each once
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("sparsity", [0.6, 0.617])
@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), Magnitude()], ids=str)
@pytest.mark.parametrize("split", [ATP(beta=0.1), {"mlp.*": 0.7}], ids=str)
def test_its_weights_count_once(split, method, sparsity):
    model = with_a_shared_mlp()
    report = prune_model(model, token_batches(), method, sparsity, allocation=split)
    found, is_pruned = report_as_found(model, method, Unstructured(sparsity), Selection(allocation=split))
    every = zeros_of_each_matrix(model)
    now = sparsity_now(model, [(report, None)])
    assert (report.sparsity, found.sparsity, now) == pytest.approx((every, every, every))
    assert is_pruned


def test_a_layer_that_has_nothing_of_its_own_is_shown_with_what_it_shares():
    model = tiny_llama(layers=3)
    first, again = model.model.layers[0], model.model.layers[2]
    again.mlp, again.self_attn = first.mlp, first.self_attn
    report = prune_model(model, token_batches(), Wanda(), 0.5, allocation={"*layers.[02].*": 0.25, "*layers.1.*": 0.75})
    header, rows = [*report.tables()][-1]
    sparsities = {row[0]: row[header.index("sparsity")] for row in rows}
    assert sparsities == {"model.layers.0": "25.00%", "model.layers.1": "75.00%", "model.layers.2": "25.00%"}
    assert report.sparsity == 0.5


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_the_size_of_the_file_is_calculated_with_it_once(tmp_path, sparsity):
    model = with_a_shared_mlp()
    size, (layers, patterns) = CompressedSize(model), Selection().choose(model, Unstructured(sparsity))
    expected = size.expected((linear, patterns[linear.name]) for layer in layers for linear in layer.linears)
    prune_model(model, token_batches(), Wanda(), sparsity)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(parameters, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert expected == compressed_file_size(tmp_path / "model.safetensors")
