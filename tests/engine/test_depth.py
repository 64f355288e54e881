"""Depth pruning: what is left computes as if the layers that went had passed everything on."""

import copy
import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from helpers import SomebodysModule, tiny_llama, token_batches
from sizes import LAYER_TYPES, SIZE, VOCABULARY
from test_families import FAMILIES

from wanda_lightning.engine.depth import prune_depth
from wanda_lightning.engine.width import prune_width
from wanda_lightning.model.decoder import decoder_layers

BATCHES = token_batches(batches=3, length=12, vocab=VOCABULARY)
# Layers of two kinds, Conv1D, a tuple as a layer's output, experts, a state, a number of layers under another name.
FOUR_LAYERS = {
    "LLaMA": {},
    "Gemma 3": {"layer_types": LAYER_TYPES["layer_types"] * 2},
    "GPT-2": {"n_layer": 4},
    "OPT": {},
    "Falcon": {},
    "Qwen3-MoE": {},
    "Jamba": {},
    "Qwen3.5": {"layer_types": ["linear_attention", "full_attention"] * 2},
}


def build(name: str, **settings):
    import transformers

    kind, own = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZE | own | {"num_hidden_layers": 4} | FOUR_LAYERS.get(name, {}) | settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def logits_without(model, gone, batch):
    """The logits of a model some of whose layers give what they are given."""

    def pass_on(_, args, kwargs, out):
        hidden = args[0] if args else kwargs["hidden_states"]
        return type(out)((hidden, *out[1:])) if isinstance(out, tuple | list) else hidden

    with ExitStack() as stack:
        for number, layer in enumerate(decoder_layers(model, targets=["*"])):
            if number in gone:
                stack.callback(layer.module.register_forward_hook(pass_on, with_kwargs=True).remove)
        return model(batch, use_cache=False).logits


def removed(report):
    return {int(name.rpartition(".")[2]) for name in report.gone}


@pytest.mark.parametrize("name", FOUR_LAYERS)
@torch.no_grad()
def test_the_layers_that_stay_compute_what_they_did(name, tmp_path):
    model = build(name)
    dense = copy.deepcopy(model)
    report = prune_depth(model, BATCHES, 1 if name == "Jamba" else 2)
    gone = removed(report)
    expected = logits_without(dense, gone, BATCHES[0])
    assert torch.equal(model(BATCHES[0], use_cache=False).logits, expected)
    assert report.kept == [number for number in range(4) if number not in gone]
    assert [*report.sizes.values()] == [(4, len(report.kept))]
    cached = model.generate(BATCHES[0][:1], max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(model.generate(BATCHES[0][:1], max_new_tokens=8, do_sample=False, use_cache=False), cached)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(again(BATCHES[0], use_cache=False).logits, expected)
    assert torch.equal(again.generate(BATCHES[0][:1], max_new_tokens=8, do_sample=False), cached)


def test_types_of_layers_and_their_numbers_follow():
    model = build("Gemma 3", layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"])
    dense = copy.deepcopy(model)
    gone = removed(prune_depth(model, BATCHES, 1))
    types = [kind for number, kind in enumerate(dense.config.layer_types) if number not in gone]
    assert model.config.layer_types == types == [layer.self_attn.layer_type for layer in model.model.layers]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert [layer.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert model.config.eos_token_id == dense.config.eos_token_id


@torch.no_grad()
def hidden_states(model):
    """What enters every layer and leaves the last one, in float64, by plain hooks: (layers + 1, tokens, D)."""
    seen = []
    with ExitStack() as stack:
        for layer in model.model.layers:
            hook = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
            stack.callback(hook.remove)
        for batch in BATCHES:
            model(batch)
    layers = len(model.model.layers)
    parts = [seen[start : start + layers] for start in range(0, len(seen), layers)]
    states = [torch.stack([part[0][0], *(out for _, out in part)]).double() for part in parts]
    return torch.cat([each.flatten(1, 2) for each in states], 1)


def cosines(model, run):
    states = hidden_states(model)
    return torch.nn.functional.cosine_similarity(states[:-run], states[run:], dim=-1)


def test_influence_is_one_minus_the_cosine():
    model = tiny_llama(layers=5, vocab_size=VOCABULARY)
    wanted = (1 - cosines(model, 1)).mean(1)
    report = prune_depth(model, BATCHES, 2)
    torch.testing.assert_close(torch.tensor([*report.figures.values()]).double(), wanted, rtol=1e-4, atol=1e-6)
    assert removed(report) == set(wanted.argsort()[:2].tolist())
    assert report.tokens == 72


def test_a_contiguous_run_turns_by_the_smallest_angle():
    model = tiny_llama(layers=5, vocab_size=VOCABULARY)
    wanted = cosines(model, 3).acos().mean(1) / torch.pi
    report = prune_depth(model, BATCHES, 3, choice="contiguous")
    torch.testing.assert_close(torch.tensor([*report.figures.values()]).double(), wanted, rtol=1e-4, atol=1e-6)
    start = int(wanted.argmin())
    assert removed(report) == {start, start + 1, start + 2}


@torch.no_grad()
def loss_without(model, gone, batches):
    losses = []
    for batch in batches:
        ids, mask = (batch["input_ids"], batch["attention_mask"]) if isinstance(batch, dict) else (batch, None)
        inputs = {"input_ids": ids} if mask is None else batch
        with ExitStack() as stack:
            for number in gone:
                hook = model.model.layers[number].register_forward_hook(lambda _, args, out: args[0])
                stack.callback(hook.remove)
            logits = model(**inputs).logits.double()
        each = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(each if mask is None else each[mask[:, 1:].flatten() == 1])
    return torch.cat(losses).mean().item()


def test_what_predicts_no_tokens_has_no_loss():
    model = tiny_llama(layers=4).model
    with pytest.raises(ValueError, match="LlamaModel predicts none: choose by 'influence'"):
        prune_depth(model, BATCHES, 1, choice="loss")
    prune_depth(model, BATCHES, 1)
    assert len(model.layers) == 3


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_decides_one_layer_after_the_other(padded):
    model = tiny_llama(layers=4, vocab_size=VOCABULARY)
    batches = BATCHES
    if padded:
        mask = torch.ones_like(BATCHES[0])
        mask[1, 7:] = 0
        batches = [{"input_ids": ids, "attention_mask": mask} for ids in BATCHES]
    gone: set[int] = set()
    for _ in range(2):
        losses = {n: loss_without(model, {*gone, n}, batches) for n in range(4) if n not in gone}
        gone.add(min(losses, key=losses.__getitem__))
    report = prune_depth(model, batches, 2, choice="loss")
    assert removed(report) == gone
    last = {f"model.layers.{n}": loss for n, loss in losses.items()}
    assert {name: report.figures[name] for name in last} == pytest.approx(last, rel=1e-4)
    assert report.figures.keys() == {f"model.layers.{n}" for n in range(4)}  # that of the first one that went, too


@pytest.mark.parametrize("choice", ["influence", "contiguous", "loss"])
def test_nothing_is_removed_if_nothing_is_asked_for(llama, choice):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    assert prune_depth(llama, BATCHES, 0, choice=choice).title == "unchanged"
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize("choice", ["influence", "contiguous", "loss"])
def test_a_model_that_overflows_loses_no_layer(llama, choice):
    llama.model.layers[2].mlp.down_proj.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"NaN.*the model overflows on this calibration set"):
        prune_depth(llama, BATCHES, 1, choice=choice)
    assert len(llama.model.layers) == 3


@pytest.mark.parametrize("choice", ["influence", "contiguous", "loss"])
def test_a_model_that_overflows_on_later_tokens_loses_no_layer(llama, choice):
    batches = [batch.masked_fill(batch == 7, 8) for batch in BATCHES]
    llama.model.embed_tokens.weight.data[7] = math.nan
    batches[-1][1, 0] = 7
    with pytest.raises(ValueError, match="what the layers are chosen by is NaN: the model overflows"):
        prune_depth(llama, batches, 1, choice=choice)
    assert len(llama.model.layers) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 3}, r"layers=3 of 3 decoder layers leaves none: give a number in \[0, 3\)"),
        ({"layers": -1}, "layers must be a whole number of at least 0, got -1"),
        ({"layers": 1.5}, "layers must be a whole number"),
        ({"choice": "random"}, "choice must be one of influence, contiguous, loss, got 'random'"),
        ({"calibration": []}, "the calibration set is empty"),
        ({"calibration": [], "choice": "loss"}, "the calibration set is empty"),
        ({"layer_list": "model.blocks"}, "has no list of layers 'model.blocks'"),
        ({"activations": "gpu", "choice": "loss"}, "activations must be one of device, cpu, disk, got 'gpu'"),
    ],
)
def test_bad_input_is_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        prune_depth(llama, **{"calibration": BATCHES, "layers": 1, **settings})
    assert len(llama.model.layers) == llama.config.num_hidden_layers == 3


@pytest.mark.parametrize("shrink", [prune_depth, prune_width])
def test_the_module_around_a_model_is_told_from_it(shrink):
    module = SomebodysModule()
    with pytest.raises(ValueError, match=r"SomebodysModule is no model of transformers.* such as module\.model"):
        shrink(module, BATCHES)


@pytest.mark.parametrize("shrink", [prune_depth, prune_width])
def test_other_models_than_those_of_transformers_are_refused(shrink):
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)
    with pytest.raises(ValueError, match="TransformerEncoder is no model of transformers, and keeps its shapes"):
        shrink(model, BATCHES)


def test_sharded_weights_are_refused(llama):
    llama.lm_head.weight.placements = ()  # as torch's sharded tensors say where their parts are
    with pytest.raises(ValueError, match=r"1 weights are sharded over processes \(lm_head\.weight, \.\.\.\)"):
        prune_depth(llama, BATCHES, 1)


def test_layers_that_are_one_are_refused(llama):
    llama.model.layers[1] = llama.model.layers[0]
    with pytest.raises(ValueError, match="are one parameter"):
        prune_depth(llama, BATCHES, 1)


def test_what_may_not_go_is_not_tried():
    """The last layers of Gemma 3n read keys of earlier ones."""
    model = build("Gemma 3n")
    with pytest.raises(
        ValueError,
        match=r"only 0 layers can go, 1 are asked for: without model\.layers\.0 no number in Gemma3nTextConfig",
    ):
        prune_depth(model, BATCHES, 1, choice="loss")


def test_layers_that_depend_on_their_place_are_refused():
    model = build("Jamba")  # whether a layer has attention or experts goes by its number
    with pytest.raises(
        ValueError, match=r"only 2 layers can go, 3 are asked for: without model\.layers\.1, .* the model does not run"
    ):
        prune_depth(model, BATCHES, 3)
    assert len(model.model.layers) == 4


def test_numpys_numbers_are_those_of_python(llama):
    assert repr(prune_depth(llama, BATCHES, np.int64(1)).settings) == repr({"layers": 1, "choice": "influence"})
