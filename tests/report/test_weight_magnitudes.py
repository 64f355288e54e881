import math

import pytest
import torch

from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import SparseGPT, Wanda
from wanda_lightning.report.weight_magnitudes import SAMPLE, ZERO, Magnitudes
from wanda_lightning.sparsity import Unstructured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_in_the_bin_of_its_logarithm(dtype):
    weight = (torch.randn(31, 65) * 0.02).to(dtype)
    weight[3, 4:9] = 0
    mask = torch.rand(31, 65) > 0.4
    counts = Magnitudes()
    for half in (slice(0, 20), slice(20, None)):
        counts.count(weight[half], mask[half])
    expected = {True: {}, False: {}}
    for w, kept in zip(weight.flatten().tolist(), mask.flatten().tolist(), strict=True):
        b = math.floor(4 * math.log2(abs(w))) if w else ZERO
        expected[kept][b] = expected[kept].get(b, 0) + 1
    assert counts == Magnitudes(expected[True], expected[False])


def test_transposed_weights_count_alike():
    weight, mask = torch.randn(16, 24), torch.rand(16, 24) > 0.5
    straight, turned = Magnitudes(), Magnitudes()
    straight.count(weight, mask)
    turned.count(weight.t(), mask.t())
    assert straight == turned


def test_of_a_large_matrix_a_sample_is_counted():
    counts = Magnitudes()
    weight = torch.ones(64, SAMPLE // 16)
    counts.count(weight, weight > 0)
    assert counts == Magnitudes({0: SAMPLE}, {})


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=str)
def test_pruning_counts_the_weights_before_it_by_kind(llama, batches, method):
    before = {name: weight.detach().clone() for name, weight in llama.named_parameters()}
    report = prune_model(llama, batches, method, Unstructured(0.5), ignore=["o_proj"])
    assert set(report.magnitudes) == {row.kind for row in report.linears}
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    kept = [before[name][llama.get_parameter(name) != 0] for name in names]
    smallest = min(weights.abs().min().item() for weights in kept)
    counts = report.magnitudes["mlp.up_proj"]
    assert sum(counts.kept.values()) == sum(len(weights) for weights in kept)
    assert sum(counts.pruned.values()) == sum(before[name].numel() for name in names) - sum(map(len, kept))
    assert min(counts.kept) == math.floor(4 * math.log2(smallest))
