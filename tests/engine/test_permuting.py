"""Neurons in another order: the same model before it is pruned, and less is lost when it is."""

import pytest
import torch
from crashing import CrashError, Crashing
from helpers import digests, tiny_llama, tiny_mixtral, token_batches
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
)

from wanda_lightning import Magnitude, SparseGPT, Unstructured, Wanda, prune_model
from wanda_lightning.checkpoints.loading import load_streamed
from wanda_lightning.engine import permuting
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.model.coupling import find_neurons
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.neurons import reorder_neurons
from wanda_lightning.sparsity import SemiStructured

BATCHES = token_batches(8, batch_size=2, length=16, vocab=64)
TWO_OF_FOUR = SemiStructured(2, 4)


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def phi3():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Phi3ForCausalLM(Phi3Config(vocab_size=64, **sizes, pad_token_id=0, initializer_range=0.2)).eval()


FAMILIES = {"llama": tiny_llama, "GPT-2": gpt2, "fused gate and up": phi3, "experts": tiny_mixtral}


def neurons_of(model):
    with torch.no_grad():
        found = find_neurons(model, decoder_layers(model))
    return [each for layer in found.values() for each in layer]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def differing(one, other):
    return [n for (n, a), b in zip(one.named_parameters(), other.parameters(), strict=True) if not torch.equal(a, b)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_with_its_neurons_in_another_order_is_the_same(family):
    model, before = FAMILIES[family](), FAMILIES[family]()
    for each in neurons_of(model):
        reorder_neurons(each, torch.randperm(each.width))
    moved = [name for each in neurons_of(model) for name in each.parameters]
    assert {*differing(model, before)} == {*moved}
    torch.testing.assert_close(model(BATCHES[0]).logits, before(BATCHES[0]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("true_sequential", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_only_the_mask_is_another_one(family, true_sequential):
    """Where only the matrices that read neurons are pruned, the others tell where each neuron went."""
    dense, model = FAMILIES[family](), FAMILIES[family]()
    names = [each.reader.name for each in neurons_of(dense)]
    settings = {"targets": names, "true_sequential": true_sequential}
    report = prune_model(model, BATCHES, Wanda(), TWO_OF_FOUR, permute=True, **settings)
    assert {row.name: row.sparsity for row in report.linears} == dict.fromkeys(names, 0.5)
    for each, was in zip(neurons_of(model), neurons_of(dense), strict=True):
        pruned_OI = each.reader.weight_OI
        assert ((pruned_OI != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()
        order = _order(each, was)
        assert sorted(order) == [*range(each.width)] != order
        kept = pruned_OI != 0
        assert torch.equal(pruned_OI, was.reader.weight_OI[:, order] * kept)
        reorder_neurons(each, torch.tensor(order).argsort())  # back to where they were
    assert {*differing(model, dense)} == {each.reader.parameter_name for each in neurons_of(dense)}


def _order(each, was):
    """Match the rows of the first matrix that writes neurons with those that it had."""
    (writer, _), (dense, _) = each.writers[0], was.writers[0]
    rows, before = writer.weight_OI[: each.width], dense.weight_OI[: each.width]
    return [int((before == row).all(1).nonzero()) for row in rows]


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT(block_size=16)], ids=str)
def test_less_is_lost(method):
    errors = []
    for permute in (False, True):
        report = prune_model(
            tiny_llama(), BATCHES, method, TWO_OF_FOUR, targets=["down_proj"], permute=permute, exact_error=True
        )
        errors.append([row.error for row in report.linears])
    assert all(after < before for before, after in zip(*errors, strict=True))


def scores(monkeypatch, method, **settings):
    """What the order of each layer's neurons is chosen by, and the model before it is pruned."""
    seen = []

    def order(score_OI, _):
        seen.append(score_OI.clone())
        return torch.arange(score_OI.shape[1])

    monkeypatch.setattr(permuting, "grouped", order)
    prune_model(tiny_llama(), BATCHES, method, TWO_OF_FOUR, permute=True, **settings)
    return seen, tiny_llama()


@torch.no_grad()
def test_what_enters_a_neuron_counts_in_the_order(monkeypatch):
    seen, dense = scores(monkeypatch, Wanda())
    reader, inputs = dense.model.layers[0].mlp.down_proj, []
    reader.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    for batch in BATCHES:
        dense(batch)
    lost_OI = (reader.weight * torch.cat(inputs).norm(dim=0)).square()
    torch.testing.assert_close(seen[0], lost_OI, rtol=1e-4, atol=1e-8)


def test_without_calibration_weights_alone_count_in_the_order(monkeypatch):
    seen, dense = scores(monkeypatch, Magnitude())
    assert torch.equal(seen[0], dense.model.layers[0].mlp.down_proj.weight.detach().square())


def test_layers_whose_neurons_are_read_by_a_dense_matrix_keep_their_order(monkeypatch):
    seen, dense = scores(monkeypatch, Magnitude(), ignore=["layers.0.mlp.down_proj"])
    read = [layer.mlp.down_proj.weight.detach().square() for layer in dense.model.layers[1:]]
    torch.testing.assert_close(seen, read, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"true_sequential": False},
        {"true_sequential": True, "exact_error": True},
        {"dense_target": True},
        {"dense_target": True, "reconstruction": Reconstruction(epochs=2, lr=1e-3), "activations": "disk"},
    ],
    ids=["two passes", "one pass", "dense target", "reconstruction"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_if_the_neurons_had_always_stood_so(family, settings, monkeypatch):
    def mixed(score_OI, _):
        return torch.randperm(score_OI.shape[1], generator=torch.Generator().manual_seed(score_OI.shape[1]))

    monkeypatch.setattr(permuting, "grouped", mixed)
    model, before = FAMILIES[family](), FAMILIES[family]()
    for each in neurons_of(before):
        reorder_neurons(each, mixed(each.reader.weight_OI, None))
    reports = [
        prune_model(net, BATCHES, SparseGPT(block_size=16), TWO_OF_FOUR, permute=permute, **settings)
        for net, permute in ((model, True), (before, False))
    ]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dict(before.named_parameters())[name], rtol=1e-3, atol=1e-4, msg=name)
    for found, wanted in zip(*(report.linears for report in reports), strict=True):
        assert found.error == pytest.approx(wanted.error, rel=1e-3)
        assert found.dense_target == pytest.approx(wanted.dense_target, abs=1e-3)


@pytest.mark.parametrize("targets", [None, ["c_attn", "mlp.c_proj"]], ids=["all", "without what writes neurons"])
def test_a_run_that_goes_on_ends_with_the_same_bytes(targets, tmp_path, monkeypatch):
    monkeypatch.setattr(Crashing, "__str__", lambda _: str(Wanda()))
    whole = gpt2()
    prune_model(whole, BATCHES, Wanda(), TWO_OF_FOUR, permute=True, targets=targets)
    for limit in (5 if targets is None else 3, 1000):
        Crashing.limit, journal, model = limit, Journal(tmp_path), gpt2()
        try:
            prune_model(model, BATCHES, Crashing(), TWO_OF_FOUR, permute=True, targets=targets, journal=journal)
        except CrashError:
            assert limit < 10
        finally:
            journal.release()
    assert 990 < Crashing.limit < 1000  # not all were pruned again
    assert differing(model, whole) == []


def test_after_an_error_the_layer_is_as_it_was():
    model, Crashing.limit = tiny_llama(), 3
    with pytest.raises(CrashError):
        prune_model(model, BATCHES, Crashing(), TWO_OF_FOUR, permute=True)
    assert differing(model, tiny_llama()) == []


def refusals():
    adapted = tiny_llama()
    adapted.model.layers[0].mlp.up_proj.base_layer = nn.Linear(32, 64)
    tied = tiny_llama()
    tied.model.layers[1].mlp.down_proj.weight = tied.model.layers[0].mlp.down_proj.weight
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "intermediate_size": 64}
    mamba = FalconMambaForCausalLM(FalconMambaConfig(vocab_size=64, **sizes)).eval()
    yield "unstructured", tiny_llama(), Unstructured(0.5), {}, "groups of an N:M pattern"
    yield "adapters", adapted, TWO_OF_FOUR, {}, "keeps the order of its neurons"
    yield "shared", tied, TWO_OF_FOUR, {}, "keeps the order of its neurons"
    yield "not pruned", tiny_llama(), TWO_OF_FOUR, {"ignore": ["down_proj"]}, "no matrix that reads the neurons"
    yield "no MLP", mamba, TWO_OF_FOUR, {"ignore": ["dt_proj", "x_proj"]}, "no MLP of a known coupling"


@pytest.mark.parametrize(
    ("model", "pattern", "settings", "message"), [x[1:] for x in refusals()], ids=[x[0] for x in refusals()]
)
def test_refused_before_any_weight_has_changed(model, pattern, settings, message):
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        prune_model(model, BATCHES, Wanda(), pattern, permute=True, **settings)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_not_for_streamed_models(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    before = digests(tmp_path / "dense")
    journal = Journal(tmp_path / "journal")
    with pytest.raises(ValueError, match="keeps the order of its neurons: load it without stream"):
        prune_model(
            load_streamed(str(tmp_path / "dense")), BATCHES, Wanda(), TWO_OF_FOUR, permute=True, journal=journal
        )
    journal.release()
    assert digests(tmp_path / "dense") == before
