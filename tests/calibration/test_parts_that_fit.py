"""Hessians that do not fit in memory together are gathered in several passes over the calibration set."""

from weakref import WeakSet

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral, token_batches

from wanda_lightning.calibration.walk import walk
from wanda_lightning.engine.layer_pruning import prune_layer
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.settings import PruningSettings
from wanda_lightning.engine.stacks import Found
from wanda_lightning.methods import SparseGPT
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.sparsity import Unstructured
from wanda_lightning.statistics import InputHessian, InputNorm

QKV, ATTENDED, GATE_UP, DOWN = 4 * 32**2, 4 * 32**2, 4 * 32**2, 4 * 64**2  # bytes of the Hessians of tiny_llama's layer


class Counted(InputHessian):
    """A Hessian that knows how many bytes all of its kind take."""

    alive: WeakSet["Counted"] = WeakSet()
    peak = 0

    def __init__(self, in_features, *args, **kwargs):
        super().__init__(in_features, *args, **kwargs)
        Counted.alive.add(self)
        Counted.peak = max(Counted.peak, sum(each.total.nbytes for each in Counted.alive))


class Counting(SparseGPT):
    statistic = Counted


def pruned(model, memory):
    """Prune the first layer; return its weights and how many bytes Hessians took at a time."""
    Counted.alive.clear()
    Counted.peak = 0
    layers = decoder_layers(model)
    method = Counting(block_size=16)
    with torch.no_grad():
        step = next(iter(walk(model, layers, token_batches())))
        step.memory = memory
        asked = PruningSettings(method=method, pattern=Unstructured(0.5))
        plan = Plan.of(model, asked, Found(None, asked.selection))
        done = prune_layer(step.layer, step, plan, Processes.alone()).linears
    assert [linear.row.name for linear in done] == [linear.name for linear in step.layer.linears]
    return {name: weight.clone() for name, weight in layers[0].module.named_parameters()}, Counted.peak


@pytest.mark.parametrize(
    ("memory", "names"),
    [
        (None, ["qkv o gate up down"]),
        (QKV + ATTENDED + GATE_UP + DOWN, ["qkv o gate up down"]),
        (QKV + ATTENDED + DOWN, ["qkv o gate up", "down"]),
        (1, ["qkv o gate up", "down"]),  # the largest Hessian has to fit in any case, and then others do too
    ],
)
@torch.no_grad()
def test_linears_of_a_pass_fit_in_memory(memory, names):
    model = tiny_llama()
    step = next(iter(walk(model, decoder_layers(model), token_batches())))
    step.memory = memory
    short = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": " o ", "gate_proj": "gate ", "up_proj": "up "}
    parts = [
        "".join(short.get(linear.name.rpartition(".")[2], "down") for linear in part).strip()
        for part in step.parts(InputHessian)
    ]
    assert parts == names
    assert len(step.parts(InputNorm)) == 1


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
def test_passes_change_no_weight_and_keep_the_promise(build):
    dense = build()
    at_once, all_hessians = pruned(build(), None)
    in_parts, largest = pruned(build(), 1)
    assert all(torch.equal(in_parts[name], weight) for name, weight in at_once.items())
    before = dict(decoder_layers(dense)[0].module.named_parameters())
    assert not all(torch.equal(before[name], weight) for name, weight in at_once.items())
    groups = 3 * [32] + [64] if build is tiny_llama else 2 * [32] + 4 * [32] + 4 * [64]
    assert all_hessians == 4 * sum(width**2 for width in groups)
    assert largest == 4 * 64**2
