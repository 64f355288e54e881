"""What names tell: kinds, and the numbers of layers."""

import pytest
import torch
from helpers import mixtral, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.names import kind_of, list_of, number_of


def gpt2() -> GPT2LMHeadModel:
    """Its linears store their weights as (in, out)."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "mlp.up_proj"),
        ("model.layers.3.mlp.experts.7.up_proj", "model.layers.3", "mlp.experts.*.up_proj"),
        ("model.layers.3.mlp.experts.up_proj.7", "model.layers.3", "mlp.experts.up_proj.*"),
        ("mlp.experts.7.w1", "", "mlp.experts.*.w1"),
        ("model.layers.31.mlp.fc1", "model.layers.3", "model.layers.*.mlp.fc1"),  # of another layer
    ],
)
def test_kinds(name, layer, kind):
    assert kind_of(name, layer) == kind


def test_layers():
    assert (list_of("model.layers.12"), number_of("model.layers.12")) == ("model.layers", 12)
    assert (list_of("3"), number_of("3")) == ("", 3)
    assert number_of("model.norm") is None
    assert number_of("") is None


@pytest.mark.parametrize("build", [tiny_llama, mixtral, gpt2])
def test_layers_come_in_the_order_of_their_list(build):
    model = build()
    for number, layer in enumerate(decoder_layers(model)):
        assert number_of(layer.name) == number
        assert model.get_submodule(layer.list_name)[number] is layer.module


@pytest.mark.parametrize("build", [tiny_llama, mixtral, gpt2])
def test_a_stored_tensor_is_seen_as_the_weight_is(build):
    """Also one of a type that no parameter could have a gradient in; nothing is put into the module."""
    for linear in decoder_layers(build())[0].linears:
        before, stored = linear.weight, linear.weight.detach().clone()
        assert torch.equal(linear.view(stored), linear.weight_OI)
        assert linear.view(stored.to(torch.int8)).shape == linear.weight_OI.shape
        assert linear.weight is before
        linear.view(stored).zero_()
        assert linear.expert is not None or not stored.any()  # a view, not a copy
        assert linear.weight.any()
