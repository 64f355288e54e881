"""A weight that is computed for every call cannot be pruned in place: it is refused or ignored, never misreported."""

from contextlib import nullcontext

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral, token_batches
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from wanda_lightning import Magnitude, SparseGPT, Unstructured, Wanda, prune_model


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "a parametrization of one's own": lambda linear: parametrize.register_parametrization(linear, "weight", Doubled()),
    "weight_norm by a hook": weight_norm,
    "spectral_norm by a hook": spectral_norm,
    "torch.nn.utils.prune": lambda linear: prune.l1_unstructured(linear, "weight", 0.2),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")


def wrapped(way):
    model = tiny_llama(layers=2)
    WAYS[way](model.model.layers[1].mlp.up_proj)
    return model


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(block_size=16), Magnitude()], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_before_anything_changes(way, method):
    model = wrapped(way)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is computed from other parameters"):
        prune_model(model, token_batches(), method, Unstructured(0.5))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("ignore", "refused"), [(None, True), (["*experts*"], False)])
def test_so_are_fused_experts_that_have_adapters_of_their_own(ignore, refused):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_mixtral(), LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"]))
    with pytest.raises(ValueError, match="has an adapter of its own") if refused else nullcontext():
        prune_model(model, token_batches(), Wanda(), Unstructured(0.5), ignore=ignore)
    attention, experts = (model.get_submodule(f"base_model.model.model.layers.0.{x}") for x in ("self_attn", "mlp"))
    assert (attention.q_proj.weight == 0).float().mean() == (0 if refused else 0.5)
    assert all((p != 0).all() for name, p in experts.named_parameters() if "lora_B" not in name)


@pytest.mark.parametrize("way", WAYS)
def test_it_may_be_ignored(way):
    model = wrapped(way)
    report = prune_model(model, token_batches(), Wanda(), Unstructured(0.5), ignore=["layers.1.mlp.up_proj"])
    assert len(report.linears) == 2 * 7 - 1
    model(token_batches()[0])  # hooks compute the weight
    assert (model.model.layers[1].mlp.up_proj.weight == 0).float().mean() < 0.25
    assert {row.sparsity for row in report.linears} == {0.5}


def test_it_is_pruned_once_it_is_an_ordinary_weight_again():
    model = tiny_llama(layers=2)
    linear = model.model.layers[1].mlp.up_proj
    parametrizations.weight_norm(linear)
    parametrize.remove_parametrizations(linear, "weight")
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.2)
    prune.remove(model.model.layers[0].mlp.up_proj, "weight")
    prune_model(model, token_batches(), Wanda(), Unstructured(0.5))
    assert (linear.weight == 0).float().mean() == 0.5


def test_the_report_says_what_the_layer_computes_with(llama, batches, monkeypatch):
    """A method that claims to prune, and whose weight another hand restores before the layer is left."""
    up = llama.model.layers[1].mlp.up_proj
    dense = up.weight.detach().clone()
    monkeypatch.setattr(
        "torch.clear_autocast_cache", lambda: up.weight.data.copy_(dense)
    )  # the last thing that happens to a layer
    report = prune_model(llama, batches, Wanda(), Unstructured(0.5))
    rows = {row.name: row.sparsity for row in report.linears}
    assert rows["model.layers.1.mlp.up_proj"] == 0
    assert rows["model.layers.0.mlp.up_proj"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_packed_weights_are_refused(llama, batches, dtype):
    linear = llama.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj holds torch\.\w+, not floating-point weights"):
        prune_model(llama, batches, Wanda(), Unstructured(0.5))
