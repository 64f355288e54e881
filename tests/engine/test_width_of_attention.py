"""Key/value groups: what is left is the attention that an ordinary config describes, chosen and fitted as it says."""

import copy

import pytest
import torch
from helpers import tiny_llama, token_batches
from sizes import VOCABULARY
from test_families import build

from wanda_lightning.calibration.walk import walk
from wanda_lightning.engine.narrowing import groups_of
from wanda_lightning.engine.width import prune_width
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.statistics import InputHessian

# Biases, norms of queries and keys, two kinds of layers, one matrix for all three, as many keys as queries, one layer
# of three with attention, convolutions with matrices of the same shapes.
FAMILIES = ["LLaMA", "Qwen2", "Qwen3", "Gemma 3", "Phi-3", "Phi", "Nemotron-H", "LFM2"]
BATCHES = token_batches(batches=3, length=12, vocab=VOCABULARY)
SIZE = 8  # numbers of a head


def readers(model):
    """The matrices that read the heads."""
    layers = decoder_layers(model, targets=["*"])
    names = ("o_proj", "self_attn.dense", "self_attn.out_proj")
    return [linear for layer in layers for linear in layer.linears if linear.name.endswith(names)]


@pytest.mark.parametrize("choice", ["obs", "magnitude"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_groups_that_nothing_reads_can_go(name, choice, tmp_path):
    model = build(name)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    gone = torch.tensor([False, True] if groups == 2 else [True, False, False, True])
    for reader in readers(model):
        reader.weight_OI[:, gone.repeat_interleave(heads // groups * SIZE)] = 0
        gone = ~gone
    model.double()  # a product of fewer heads is summed in another order
    logits, before = model(BATCHES[0]).logits, sum(p.numel() for p in model.parameters())
    report = prune_width(model, BATCHES, 1.0, choice=choice, attention_keep=0.5)
    torch.testing.assert_close(model(BATCHES[0]).logits, logits, rtol=1e-12, atol=1e-12)
    assert report.sizes == {"num_attention_heads": (heads, heads // 2), "num_key_value_heads": (groups, groups // 2)}
    assert report.parameters == (before, sum(p.numel() for p in model.parameters()))
    assert report.parameters[1] < before
    model.float().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.head_dim == SIZE
    assert again.config.num_key_value_heads == groups // 2
    assert torch.equal(again(BATCHES[0]).logits, model(BATCHES[0]).logits)
    tokens = [each.generate(BATCHES[0][:1], max_new_tokens=6, do_sample=False) for each in (model, again)]
    assert torch.equal(*tokens)


@torch.no_grad()
def by_hand(model, groups: int, block: int, shrinkage: float):
    """The same with columns of o_proj zeroed in place of narrower, in float64, by trying every group."""
    for step in walk(model, decoder_layers(model, ["o_proj"]), BATCHES):
        (linear,) = step.layer.linears
        weight, hessian = linear.weight_OI.double(), step.collect(InputHessian)[linear.name].compute().double()
        width = weight.shape[1]
        damped = hessian + (0.01 * hessian.diagonal().mean() + shrinkage * hessian.diagonal()).diag()
        mask = torch.ones(width, dtype=torch.bool)
        for _ in range(groups):
            masks = []
            for start in range(0, width, block):
                if mask[start]:
                    masks.append(mask.clone())
                    masks[-1][start : start + block] = False
            mask = min(masks, key=lambda each: loss(weight, each, damped))
        linear.weight_OI.copy_(fitted(weight, mask, hessian, shrinkage))
    return model


def fitted(weight, mask, hessian, shrinkage):
    new = weight * mask
    diagonal_K = hessian.diagonal()[mask]
    added = (0.01 * diagonal_K.mean() + shrinkage * diagonal_K).diag()
    new[:, mask] += torch.linalg.solve(
        hessian[mask][:, mask] + added, hessian[mask][:, ~mask] @ weight[:, ~mask].t()
    ).t()
    return new


def loss(weight, mask, hessian):
    """The least squared error with some columns, by the Schur complement of the others."""
    rest = hessian[~mask][:, ~mask] - hessian[~mask][:, mask] @ torch.linalg.solve(
        hessian[mask][:, mask], hessian[mask][:, ~mask]
    )
    return torch.trace(weight[:, ~mask] @ rest @ weight[:, ~mask].t()).item()


@torch.no_grad()
def test_each_layer_loses_the_groups_that_it_misses_least():
    model = tiny_llama(vocab_size=VOCABULARY, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    expected = by_hand(copy.deepcopy(model), 2, 8, 0.1)
    report = prune_width(model, BATCHES, 1.0, attention_keep=0.5)
    attention = model.model.layers[1].self_attn
    assert attention.o_proj.weight.shape == (32, 16)
    assert attention.q_proj.weight.shape == (16, 32)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (8, 32)
    assert model.config.head_dim == 4
    torch.testing.assert_close(model(BATCHES[0]).logits, expected(BATCHES[0]).logits, rtol=1e-3, atol=1e-3)
    errors = {name: error for name, error in report.figures.items() if name.endswith("o_proj")}
    assert len(errors) == 3
    assert all(0 < error < 1 for error in errors.values())


@pytest.mark.parametrize("choice", ["wanda", "magnitude"])
@torch.no_grad()
def test_cheaper_choices_take_the_sum_over_a_group(choice):
    model = tiny_llama(vocab_size=VOCABULARY, layers=1)
    dense = copy.deepcopy(model.model.layers[0].self_attn.o_proj.weight)
    (step,) = walk(model, decoder_layers(model, ["o_proj"]), BATCHES)
    norm = step.collect(InputHessian)["model.layers.0.self_attn.o_proj"].compute().diagonal().sqrt()
    score = (dense.abs() * (norm if choice == "wanda" else 1)).sum(0).view(2, 16).sum(1)
    prune_width(model, BATCHES, 1.0, choice=choice, refit=False, attention_keep=0.5)
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight, dense.view(32, 2, 16)[:, score.argmax()])


@torch.no_grad()
def test_neurons_and_groups_go_together(tmp_path):
    model = tiny_llama(vocab_size=VOCABULARY)
    report = prune_width(model, BATCHES, 0.5, attention_keep=0.5)
    assert report.title == "num_attention_heads 4 -> 2, num_key_value_heads 2 -> 1, intermediate_size 64 -> 32"
    assert report.kept == [[64, 1, 32], [32, 16, 16]]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(BATCHES[0]).logits, model(BATCHES[0]).logits)


def test_nothing_is_removed_where_the_number_of_groups_stays(llama):
    assert prune_width(llama, BATCHES, 1.0, attention_keep=0.8).title == "unchanged"
    assert llama.config.num_key_value_heads == 2


@pytest.mark.parametrize(("groups", "keep", "kept"), [(3, 0.8, 2), (3, 0.5, 2), (8, 0.75, 6), (2, 0.8, 2)])
def test_how_many_groups_stay(groups, keep, kept):
    assert groups_of(groups, keep) == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_keep": 0}, r"attention_keep must be a fraction of the key/value groups in \(0, 1\], got 0"),
        ({"attention_keep": 1.5}, "attention_keep must be"),
        ({"attention_keep": float("nan")}, "attention_keep must be"),
        ({"attention_keep": True, "keep": True}, "keep must be"),
        ({"attention_keep": 0.2}, "attention_keep=0.2 of 2 key/value groups leaves none: keep more"),
        ({"attention_keep": 0.5, "calibration": []}, "the calibration set is empty"),
    ],
)
def test_bad_input_is_refused(llama, settings, message):
    before = [parameter.clone() for parameter in llama.parameters()]
    with pytest.raises(ValueError, match=message):
        prune_width(llama, **{"calibration": BATCHES, **settings})
    assert all(map(torch.equal, llama.parameters(), before))
    assert llama.config.num_key_value_heads == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GPT-2", r"of no known form for 4 heads of 8 numbers in \d key/value groups.*transformer\.h\.0\.attn\.c_attn"),
        ("GPT-NeoX (Pythia)", r"of no known form.*attention\.query_key_value \(96, 32\)"),
        ("OLMo 2", r"of no known form.*self_attn\.q_proj \(32, 32\)"),  # norms over all heads
        ("GPT-OSS", r"self_attn\.sinks is \(2,\) with 1 groups, by its config"),
        ("DeepSeek-V3", r"of no known form.*self_attn\.q_b_proj"),
        ("Qwen3-Next", r"of no known form.*self_attn\.q_proj \(64, 32\)"),  # gates
        ("Gemma 3n", r"of no known form.*model\.layers\.2"),  # keys that layers share
        ("Gemma 4", "Gemma4TextConfig does not take head_dim=8, num_attention_heads=2"),
        ("Falcon", "FalconConfig does not take head_dim=8"),
    ],
)
def test_attention_of_other_forms_is_refused_before_anything_changes(name, message):
    model = build(name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_width(model, BATCHES, 0.5, attention_keep=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_number_of_heads_that_the_family_refuses_is_refused():
    """LLaMA's own config wants a hidden size that is a multiple of the number of heads."""
    model = tiny_llama(vocab_size=VOCABULARY, num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"LlamaConfig does not take .*num_attention_heads=6.*not a multiple"):
        prune_width(model, BATCHES, 1.0, attention_keep=0.75)
    assert model.config.num_attention_heads == 8


def test_a_config_that_says_nothing_of_heads_is_refused():
    with pytest.raises(ValueError, match=r"MambaConfig says num_attention_heads=None|no MLP of a known coupling"):
        prune_width(build("Mamba"), BATCHES, 1.0, attention_keep=0.5)


def test_an_mlp_as_wide_as_all_heads_together_keeps_a_number_of_its_own():
    model = tiny_llama(intermediate_size=32)
    report = prune_width(model, BATCHES, 0.25, multiple=1, attention_keep=0.5)
    assert report.sizes == {
        "intermediate_size": (32, 8),
        "num_attention_heads": (4, 2),
        "num_key_value_heads": (2, 1),
    }
