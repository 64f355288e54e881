import pytest
import torch
from conftest import tiny_llama
from torch import nn

from wanda_lightning.decoder import causal_lm, decoder_layers, max_sequence_length


def names(layers):
    return [linear.name for layer in layers for linear in layer.linears]


def test_finds_every_linear_of_every_layer(llama):
    expected = [n for n, m in llama.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert names(decoder_layers(llama)) == expected
    assert len(expected) == 3 * 7


def test_conv1d_is_seen_as_out_by_in():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32))
    linears = {linear.name: linear for layer in decoder_layers(model) for linear in layer.linears}
    assert len(linears) == 2 * 4
    weight_OI = linears["transformer.h.1.mlp.c_fc"].weight_OI
    assert weight_OI.shape == (128, 32)
    weight_OI.zero_()  # a view: the module changes
    assert not model.transformer.h[1].mlp.c_fc.weight.any()


def test_targets_and_ignore_match_names_and_their_ends(llama):
    assert names(decoder_layers(llama, targets=["q_proj"])) == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert len(names(decoder_layers(llama, targets=["model.layers.0.*"]))) == 7
    assert len(names(decoder_layers(llama, ignore=["*.mlp.*"]))) == 3 * 4
    assert names(decoder_layers(llama, targets=["model.layers.1.*"], ignore=["*_proj"])) == []
    assert len(decoder_layers(llama, targets=["model.layers.0.*"])) == 3


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_refused(llama, argument):
    with pytest.raises(ValueError, match=r"'qproj' matches no linear.*q_proj"):
        decoder_layers(llama, **{argument: ["q_proj", "qproj"]})


def test_the_head_is_no_target(llama):
    with pytest.raises(ValueError, match="'lm_head' matches no linear of the decoder"):
        decoder_layers(llama, targets=["lm_head"])


class RoutedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])


class Bare(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.blocks = nn.ModuleList(layers)


def test_routers_are_left_alone_unless_named():
    model = Bare([RoutedLayer() for _ in range(5)])
    assert not any("gate" in name for name in names(decoder_layers(model)))
    assert names(decoder_layers(model, targets=["gate"])) == [f"blocks.{i}.gate" for i in range(5)]


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="no decoder layers found in Sequential"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


class FusedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.zeros(4, 8, 8))


def test_a_decoder_of_uncovered_weights_is_refused():
    with pytest.raises(ValueError, match=r"80% of the decoder's matrix weights.*blocks\.0\.experts \(4, 8, 8\)"):
        decoder_layers(Bare([FusedExperts(), FusedExperts()]))


def test_the_language_model_is_found_inside_any_module(llama):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.nested = nn.ModuleDict({"lm": llama})

    assert causal_lm(Mine()) is llama
    assert causal_lm(llama) is llama
    with pytest.raises(ValueError, match="exactly one transformers model to prune, found: none"):
        causal_lm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"found: 0 \(LlamaForCausalLM\), 1 \(LlamaForCausalLM\)"):
        causal_lm(nn.ModuleList([llama, tiny_llama()]))


def test_sequence_limit(llama):
    assert max_sequence_length(llama) == 128
