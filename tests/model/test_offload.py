"""Layers that accelerate keeps on disk or in RAM: the same bytes as in memory, and their source is not written to."""

import pytest
import torch
from helpers import digests, tiny_llama, tiny_mixtral, tiny_zamba2, token_batches
from transformers import AutoModelForCausalLM

from wanda_lightning.allocation.owl import OWL
from wanda_lightning.checkpoints.loading import load_streamed
from wanda_lightning.checkpoints.saving import save_pretrained
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Magnitude, SparseGPT, Wanda
from wanda_lightning.model.offload import in_memory, is_offloaded, is_on_disk, stored_parameters
from wanda_lightning.sparsity import SemiStructured, Unstructured

MODELS = {
    "llama": lambda: tiny_llama(),
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "bfloat16": lambda: tiny_llama().bfloat16(),
    "mixtral": tiny_mixtral,
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    MODELS[request.param]().save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    return tmp_path / "dense"


def test_in_memory_loads_a_layer_and_lets_it_go(folder):
    whole, streamed = AutoModelForCausalLM.from_pretrained(folder), load_streamed(str(folder))
    layer, wanted = streamed.model.layers[1], whole.model.layers[1].state_dict()
    assert is_on_disk(streamed)
    with in_memory(layer):
        assert all(torch.equal(values, wanted[name]) for name, values in layer.state_dict().items())
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_stored_parameters_are_those_of_the_model(folder):
    whole, streamed = AutoModelForCausalLM.from_pretrained(folder), load_streamed(str(folder))
    stored = dict(stored_parameters(streamed))
    assert all(torch.equal(stored[name], parameter) for name, parameter in whole.named_parameters())


@pytest.mark.parametrize("activations", ["device", "disk"])
@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT(block_size=16)], ids=str)
def test_streaming_gives_the_bytes_of_a_run_in_memory(folder, method, one_pass, activations, tmp_path):
    before = digests(folder)
    batches = token_batches(batches=3)
    whole, streamed = AutoModelForCausalLM.from_pretrained(folder), load_streamed(str(folder))
    in_one = prune_model(whole, batches, method, Unstructured(0.5), true_sequential=one_pass)
    journal = Journal(tmp_path / "journal")
    elsewhere = {"journal": journal, "activations": activations}
    in_parts = prune_model(streamed, batches, method, Unstructured(0.5), true_sequential=one_pass, **elsewhere)
    assert is_on_disk(streamed)
    stored = dict(stored_parameters(streamed))
    assert all(torch.equal(stored[name], parameter) for name, parameter in whole.named_parameters())
    assert digests(folder) == before
    assert in_parts.sparsity == in_one.sparsity
    assert in_parts.whole_model_sparsity == pytest.approx(in_one.whole_model_sparsity)
    for streamed_row, row in zip(in_parts.linears, in_one.linears, strict=True):
        assert (streamed_row.name, streamed_row.tokens) == (row.name, row.tokens)
        assert (streamed_row.error or 0) == pytest.approx(row.error or 0, rel=1e-5)
    # Evaluation streams the same way, and so does saving.
    ids = token_batches()[0]
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, whole(ids).logits)
    save_pretrained(streamed, None, tmp_path / "in parts")
    save_pretrained(whole, None, tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "in parts")
    assert all(map(torch.equal, again.parameters(), whole.parameters()))
    assert (tmp_path / "in parts/config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()
    journal.remove()


@pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=str)
def test_after_an_error_no_layer_is_left_in_memory(folder, method, tmp_path, monkeypatch):
    def fails(*_):
        raise ArithmeticError

    streamed = load_streamed(str(folder))
    monkeypatch.setattr(type(method), "prune", fails)
    with pytest.raises(ArithmeticError) as kept:  # as a notebook keeps the last one
        prune_model(streamed, token_batches(), method, Unstructured(0.5), journal=Journal(tmp_path / "journal"))
    assert all(parameter.is_meta for parameter in streamed.model.layers.parameters()), kept


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
def test_layers_kept_in_ram_are_changed_there(one_pass):
    from accelerate import cpu_offload

    whole, offloaded = tiny_llama(), cpu_offload(tiny_llama(), execution_device="cpu")
    assert is_offloaded(offloaded)
    assert not is_on_disk(offloaded)
    for model in (whole, offloaded):
        prune_model(model, token_batches(), Wanda(), SemiStructured(2, 4), true_sequential=one_pass)
    stored = dict(stored_parameters(offloaded))
    assert all(torch.equal(stored[name], parameter) for name, parameter in whole.named_parameters())


def test_outliers_are_counted_one_layer_at_a_time(folder, tmp_path):
    found = []
    for model, journal in (
        (AutoModelForCausalLM.from_pretrained(folder), None),
        (load_streamed(str(folder)), Journal(tmp_path / "journal")),
    ):
        settings = {"allocation": OWL(factor=3), "journal": journal}
        found.append(prune_model(model, token_batches(batches=3), Wanda(), Unstructured(0.5), **settings).allocation)
    assert found[0] == found[1]
    assert len({*found[0].patterns.values()}) > 1


def test_layers_on_disk_need_a_journal(folder):
    with pytest.raises(ValueError, match=r"on disk.*give a journal"):
        prune_model(load_streamed(str(folder)), token_batches(), Wanda(), Unstructured(0.5))


def test_a_model_that_was_never_loaded_is_refused():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="never loaded"):
        prune_model(model, token_batches(), Wanda(), Unstructured(0.5))


@pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=str)
def test_buffers_that_were_never_made_are_named(method):
    """Weights that are assigned to a model on the meta device leave its rotary frequencies there."""
    with torch.device("meta"):
        model = tiny_llama()
    model.load_state_dict(tiny_llama().state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"2 weights or buffers were never loaded \(model\.rotary_emb\.inv_freq,"):
        prune_model(model, token_batches(), method, Unstructured(0.5))


def test_matrices_that_layers_share_are_refused_where_each_has_a_copy(tmp_path):
    tiny_zamba2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="share one weight, of which a model that is not in memory has copies"):
        prune_model(load_streamed(tmp_path), token_batches(vocab=64), "wanda", 0.5, journal=Journal(tmp_path / "kept"))
