from copy import deepcopy

import pytest
import torch
from helpers import tiny_llama
from lightning.fabric import Fabric
from torch import nn
from transformers import XLNetConfig, XLNetLMHeadModel

from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import SparseGPT, Wanda
from wanda_lightning.model.decoder import coverage, decoder_layers
from wanda_lightning.model.language_model import find_language_model, is_language_model, max_sequence_length
from wanda_lightning.sparsity import SemiStructured, Unstructured


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


def test_coverage_is_the_share_of_matrix_weights_that_is_pruned(llama):
    assert coverage(decoder_layers(llama)) == 1
    mlp, attention = 3 * 32 * 64, 2 * 32 * 32 + 2 * 32 * 16
    assert coverage(decoder_layers(llama, targets=["*.mlp.*"])) == mlp / (mlp + attention)
    assert coverage(decoder_layers(llama, ignore=["layers.0.*"])) == pytest.approx(2 / 3)
    with torch.device("meta"):
        assert coverage(decoder_layers(tiny_llama())) == 1
    assert coverage([]) == 0


def test_matrices_outside_linears_are_named():
    layers = [RoutedLayer() for _ in range(2)]
    for layer in layers:
        layer.mixing = nn.Parameter(torch.zeros(3, 3))
        layer.router_bias = nn.Parameter(torch.zeros(3, 3))
        layer.coefficients = nn.Linear(8, 3)
    found = decoder_layers(Bare(layers))
    assert found[0].left_dense == {
        "blocks.0.gate": "router",
        "blocks.0.mixing": "not in a linear",
        "blocks.0.coefficients": "thin",
    }
    assert names(decoder_layers(Bare(layers), targets=["coefficients"]))[0] == "blocks.0.coefficients"


def test_the_list_of_layers_can_be_named():
    model = nn.Module()
    model.encoder = Bare([nn.Linear(16, 16) for _ in range(3)])
    model.decoder = Bare([nn.Linear(8, 8), nn.Linear(8, 8)])
    assert decoder_layers(model)[0].name == "encoder.blocks.0"
    assert names(decoder_layers(model, layers="decoder.blocks")) == ["decoder.blocks.0", "decoder.blocks.1"]
    for wrong in ("decoder", "decoder.layers", "blocks", ""):
        with pytest.raises(
            ValueError, match=rf"no list of layers '{wrong}'.*encoder\.blocks \(3\), decoder\.blocks \(2\)"
        ):
            decoder_layers(model, layers=wrong)


def test_a_part_that_sees_images_is_no_decoder():
    from transformers import GitConfig, GitForCausalLM

    with torch.device("meta"):  # its image encoder is twice as large as the layers that read text, and beside them
        model = GitForCausalLM(GitConfig())
    assert decoder_layers(model)[0].name == "git.encoder.layer.0"


def test_layers_whose_parts_are_in_several_lists_are_refused():
    from transformers import XLMConfig, XLMWithLMHeadModel

    model = XLMWithLMHeadModel(XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4))
    with pytest.raises(ValueError, match=r"several lists \(transformer\.attentions, transformer\.ffns\)"):
        decoder_layers(model)
    assert len(names(decoder_layers(model, layers="transformer.attentions"))) == 2 * 4


def test_pruning_takes_the_list_of_layers_by_name(llama, batches):
    assert len(prune_model(llama, batches, Wanda(), Unstructured(0.5), layers="model.layers").linears) == 21
    with pytest.raises(ValueError, match=r"no list of layers 'layers'; its lists with linears: model\.layers \(3\)"):
        prune_model(llama, batches, Wanda(), Unstructured(0.5), layers="layers")


def test_the_language_model_is_found_inside_any_module(llama):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.nested = nn.ModuleDict({"lm": llama})

    assert find_language_model(Mine()) is llama
    assert find_language_model(llama) is llama
    with pytest.raises(ValueError, match="exactly one transformers model to prune, found: none"):
        find_language_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"found: 0 \(LlamaForCausalLM\), 1 \(LlamaForCausalLM\)"):
        find_language_model(nn.ModuleList([llama, tiny_llama()]))


def test_sequence_limit(llama):
    assert max_sequence_length(llama.config) == 128
    xlnet = XLNetLMHeadModel(XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=32, vocab_size=32))
    assert max_sequence_length(xlnet.config) is None  # takes any length, which its config calls -1


# Wrappers: the same weights must be pruned in the same way.


@pytest.fixture
def pruned(llama, batches):
    """The pruned weights without any wrapper, by name."""
    model = deepcopy(llama)
    prune_model(model, batches, SparseGPT(), SemiStructured(2, 4))
    return dict(model.named_parameters())


def agrees(model, pruned):
    return all(torch.equal(parameter, pruned[name]) for name, parameter in model.named_parameters())


def test_a_compiled_model_is_pruned_uncompiled(llama, batches, pruned):
    compiled = torch.compile(llama)
    report = prune_model(compiled, batches, SparseGPT(), SemiStructured(2, 4))
    assert report.linears[0].name == "model.layers.0.self_attn.q_proj"
    assert find_language_model(compiled) is llama
    assert find_language_model(Bare([compiled])) is llama
    assert agrees(llama, pruned)


def test_a_model_that_fabric_set_up_is_pruned_as_itself(llama, batches, pruned):
    wrapped = Fabric(accelerator="cpu", devices=1).setup(llama)
    report = prune_model(wrapped, batches, SparseGPT(), SemiStructured(2, 4))
    assert report.linears[0].name == "model.layers.0.self_attn.q_proj"
    assert find_language_model(wrapped) is llama
    assert agrees(llama, pruned)


@pytest.mark.parametrize("way", ["layers", "decoder", "forward", "forward of layers", "in place"])
def test_compiled_parts_keep_their_names(llama, batches, pruned, way):
    parameters = dict(llama.named_parameters())
    ran = []
    if way == "layers":
        llama.model.layers = nn.ModuleList(torch.compile(layer, backend=ran.append) for layer in llama.model.layers)
    elif way == "decoder":
        llama.model = torch.compile(llama.model, backend=ran.append)
    elif way.startswith("forward"):  # the first as transformers' documentation has it
        for part in [llama] if way == "forward" else llama.model.layers:
            part.forward = torch.compile(part.forward, backend=ran.append)
    else:
        llama.compile(backend=ran.append)
    report = prune_model(llama, batches, SparseGPT(), SemiStructured(2, 4))
    assert report.linears[0].name == "model.layers.0.self_attn.q_proj"
    assert len(report.linears) == 21
    assert not ran  # nothing was compiled
    assert all(torch.equal(parameter, pruned[name]) for name, parameter in parameters.items())
    assert names(decoder_layers(llama, targets=["layers.0.mlp.*"]))[0] == "model.layers.0.mlp.gate_proj"


def test_adapters_are_left_alone(llama, batches, pruned):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    adapters = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    report = prune_model(find_language_model(model), batches, SparseGPT(), SemiStructured(2, 4))
    assert report.linears[0].name == "base_model.model.model.layers.0.self_attn.q_proj.base_layer"
    assert len(report.linears) == 21
    assert not report.not_pruned
    assert all(torch.equal(model.get_parameter(name), adapter) for name, adapter in adapters.items())
    for name, parameter in model.named_parameters():
        if name not in adapters:
            assert torch.equal(parameter, pruned[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    assert len(names(decoder_layers(model, targets=["q_proj"]))) == 3
    assert coverage(decoder_layers(model)) == 1


def test_a_module_of_somebody_elses_may_hold_a_compiled_model_with_adapters(llama, batches, pruned):
    from lightning.pytorch import LightningModule
    from peft import LoraConfig

    class Theirs(LightningModule):
        def __init__(self, model):
            super().__init__()
            self.net = nn.ModuleDict({"lm": model})

    llama.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    report = prune_model(find_language_model(Theirs(torch.compile(llama))), batches, SparseGPT(), SemiStructured(2, 4))
    assert report.linears[0].name == "model.layers.0.self_attn.q_proj.base_layer"
    assert torch.equal(llama.model.layers[2].mlp.down_proj.weight, pruned["model.layers.2.mlp.down_proj.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_tied_embeddings(batches, dtype):
    model = tiny_llama(tie_word_embeddings=True).to(dtype)
    report = prune_model(model, batches, SparseGPT(), SemiStructured(2, 4))
    assert {row.sparsity for row in report.linears} == {0.5}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert (model.lm_head.weight != 0).all()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_hooks_of_accelerate_that_keep_weights_in_place_stay(llama, batches, pruned):
    from accelerate import dispatch_model

    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{i}": "cpu" for i in range(3)}
    dispatched = dispatch_model(llama, parts, main_device="cpu", force_hooks=True)
    forwards = [layer.forward for layer in dispatched.model.layers]
    assert all(hasattr(layer, "_hf_hook") for layer in dispatched.model.layers)
    prune_model(dispatched, batches, SparseGPT(), SemiStructured(2, 4))
    assert agrees(dispatched, pruned)
    assert [layer.forward for layer in dispatched.model.layers] == forwards


class Grouped(nn.Linear):
    """Half of the outputs see half of the inputs: the weight is as large as a linear's, and means something else."""

    def forward(self, x):
        halves = self.weight.view(2, -1, self.in_features).transpose(1, 2)
        return torch.einsum("...gi,gio->...go", x.unflatten(-2, (-1, 2)), halves).flatten(-2)


class Rounded(nn.Linear):
    """As in quantisation-aware training: another computation, the same matrix."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.mul(64).round() / 64, self.bias)


class Chooses(nn.Linear):
    """As some routers: it gives more than scores."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.topk(2).indices


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_class_of_linears_that_parts_its_inputs_is_left_dense(llama, device):
    llama.model.layers[0].mlp.up_proj = Grouped(32, 64, bias=False, device=device)
    layer = decoder_layers(llama)[0]
    assert layer.left_dense == {"model.layers.0.mlp.up_proj.weight": "not in a linear"}


def test_a_linear_of_no_weights_is_left_out(llama, batches):
    with pytest.warns(UserWarning, match="zero-element"):
        llama.model.layers[0].extra = nn.Linear(32, 0, bias=False)
    report = prune_model(llama, batches, Wanda(), Unstructured(0.5), targets=["*"])
    assert report.not_pruned == {"model.layers.0.extra.weight": "not in a linear"}


@pytest.mark.parametrize("kind", [Rounded, Chooses])
def test_a_class_of_linears_with_one_matrix_is_pruned(llama, kind):
    llama.model.layers[0].mlp.up_proj = kind(32, 64, bias=False)
    assert not decoder_layers(llama)[0].left_dense


def test_what_is_a_language_model():
    import transformers

    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoders = [transformers.BloomModel(transformers.BloomConfig(**size)), tiny_llama(), tiny_llama().model]
    decoders += [transformers.MambaModel(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))]
    encoders = [
        kind(config(**size, intermediate_size=64))
        for kind, config in (
            (transformers.BertForMaskedLM, transformers.BertConfig),
            (transformers.DebertaV2ForSequenceClassification, transformers.DebertaV2Config),
            (transformers.MPNetForMaskedLM, transformers.MPNetConfig),
        )
    ]
    assert [is_language_model(model) for model in decoders + encoders] == [True] * 4 + [False] * 3
