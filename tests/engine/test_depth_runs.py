"""Depth pruning leaves no model that cannot run, and measures losses of models whose layers hand something on."""

import copy
import math

import pytest
import torch
from helpers import token_batches
from sizes import VOCABULARY
from test_depth import build, removed

from wanda_lightning.engine.depth import prune_depth
from wanda_lightning.engine.shortening import Shortening
from wanda_lightning.engine.trial_run import why_it_fails

RAGGED = token_batches(2, length=12, vocab=VOCABULARY) + token_batches(1, batch_size=1, length=7, vocab=VOCABULARY)


def glm(*indexers):
    """Layers that attend to the tokens which an earlier one has chosen, where they do not choose themselves."""
    kinds = {"mlp_layer_types": ["dense"] * len(indexers), "layer_types": ["indexed_attention"] * len(indexers)}
    return build("GLM-MoE-DSA", **kinds, indexer_types=[*indexers], num_hidden_layers=len(indexers))


def hybrid():
    """A layer of attention among others, in which a cache of transformers looks for its length."""
    return build("Qwen3.5", layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"])


def described(model):
    numbers = [{name: value for name, value in vars(m).items() if type(value) is int} for m in model.modules()]
    return model.config.to_dict(), numbers, [*model.modules()], [*model.parameters()], [*model.state_dict()]


@torch.no_grad()
def loss(model):
    parts = [model(batch).logits[:, :-1].flatten(0, 1).double() for batch in RAGGED]
    return torch.nn.functional.cross_entropy(torch.cat(parts), torch.cat([x[:, 1:].flatten() for x in RAGGED])).item()


def test_losses_are_those_of_the_models_that_would_be_left():
    """Also where the layers that stay get what an earlier one hands on, and sequences have several lengths."""
    model, losses = glm("full", "full", "shared", "shared"), {}
    for number in (1, 2, 3):
        shorter = copy.deepcopy(model)
        Shortening.of(shorter).apply({number})
        losses[f"model.layers.{number}"] = loss(shorter)
    report = prune_depth(model, RAGGED, 1, choice="loss")
    assert report.figures == pytest.approx({**losses, "model.layers.0": report.figures["model.layers.0"]}, rel=1e-5)
    assert loss(model) == pytest.approx(min(report.figures.values()), rel=1e-5)


@pytest.mark.parametrize("choice", ["influence", "contiguous", "loss"])
@pytest.mark.parametrize(("make", "needed"), [(lambda: glm("full", "shared", "shared"), 0), (hybrid, 2)])
@torch.no_grad()
def test_the_layer_that_others_cannot_do_without_stays(make, needed, choice):
    model = make()
    last = model.model.layers[needed]
    for weight in last.parameters():  # it changes nothing
        weight.zero_()
    report = prune_depth(model, RAGGED, 1, choice=choice)
    assert removed(report) != {needed}
    assert last in set(model.model.layers)
    assert why_it_fails(model) == ""


@pytest.mark.parametrize("choice", ["influence", "contiguous", "loss"])
def test_nothing_has_changed_where_what_is_left_would_not_run(choice):
    model = glm("full", "shared", "shared")
    model.model.layers[0].register_forward_pre_hook(needs_all_three(model))
    before, values = described(model), [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"can go.*: without model\.layers\.\d.* the model does not run: \w+: "):
        prune_depth(model, RAGGED, 2, choice=choice)
    assert described(model) == before
    assert all(map(torch.equal, model.parameters(), values))


def test_the_whole_model_is_tried_once():
    """However many layers it cannot do without."""
    model, tried = glm("full", "shared", "shared"), []
    model.model.layers[0].register_forward_pre_hook(needs_all_three(model))
    generate = model.generate
    model.generate = lambda *args, **settings: tried.append(len(model.model.layers)) or generate(*args, **settings)
    with pytest.raises(ValueError, match="only 0 layers can go"):
        prune_depth(model, RAGGED, 1, choice="loss")
    assert tried == [3]


def test_a_layer_without_which_the_model_overflows_stays(llama):
    needed = llama.model.layers[0]
    llama.model.norm.register_forward_pre_hook(
        lambda _, args: None if needed in set(llama.model.layers) else (args[0] * math.nan,)
    )
    for weight in needed.parameters():  # it changes nothing
        weight.data.zero_()
    report = prune_depth(llama, RAGGED, 1, choice="loss")
    assert removed(report) != {0}
    assert report.figures.keys() == {"model.layers.1", "model.layers.2"}


def needs_all_three(model):
    def check(*_):
        if len(model.model.layers) < 3:
            raise LookupError("where are they?")

    return check


def test_a_model_is_as_it_was_after_a_trial():
    model = build("Gemma 3")
    before = described(model)
    plan = Shortening.of(model)
    with plan.without({0, 2}):
        assert described(model) != before
        assert len(model.model.layers) == model.config.num_hidden_layers == len(model.config.layer_types) == 2
    assert described(model) == before


def test_what_the_whole_model_cannot_do_either_is_not_asked_for(llama):
    """Such as generation, in models whose own code does not support it."""
    llama.generate = None
    assert prune_depth(llama, RAGGED, 1).kept


def test_a_layer_may_go_with_another_that_could_not_alone():
    """Jamba's layers have attention or not by their number: of four, the last one may go, then the one before it."""
    model = build("Jamba")
    for number in (2, 3):
        for name, weight in model.model.layers[number].named_parameters():
            if "layernorm" in name:
                weight.data.mul_(1e-3 if number == 2 else 1e-2)
    assert removed(prune_depth(model, RAGGED, 2)) == {2, 3}
