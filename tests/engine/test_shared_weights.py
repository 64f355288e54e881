"""One matrix under several names is pruned once; contradicting wishes are refused with both names."""

import pytest
import torch
from helpers import tiny_llama, token_batches
from torch import nn

from wanda_lightning import Magnitude, SemiStructured, SparseGPT, Unstructured, Wanda, prune_model

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


def test_embeddings_are_never_pruned_by_way_of_a_linear():
    model = tiny_llama(layers=2, vocab_size=64)  # as wide as the MLP: (64, 32) fits both
    model.model.layers[0].mlp.up_proj.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"up_proj shares its weight with model\.embed_tokens\.weight"):
        prune_model(model, token_batches(vocab=64), Wanda(), Unstructured(0.5))
