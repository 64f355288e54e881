"""Models as users have them, drawn at random: the report says what the reloaded weights say, or a ValueError came
before anything changed.

``FUZZ_DRAWS=20000 python -m pytest tests/test_fuzz.py`` draws more of them.
"""

import os
import random
from collections.abc import Callable

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral, token_batches
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from wanda_lightning import (
    Ablate,
    Magnitude,
    SemiStructured,
    SparseGPT,
    Unstructured,
    Wanda,
    prune_model,
    save_pretrained,
)
from wanda_lightning.model.decoder import decoder_layers

DRAWS = int(os.environ.get("FUZZ_DRAWS", "500"))
BLOCKS = 10  # of draws, so that a failure names a few
BATCHES = token_batches(2, batch_size=2, length=8, vocab=60)
Change = Callable[[random.Random, nn.Module, list[nn.Linear]], None]


def gpt2(rng: random.Random) -> nn.Module:
    width = rng.choice([16, 20])
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=width, n_layer=2, n_head=2, n_positions=32)).eval()


def llama(rng: random.Random) -> nn.Module:
    odd = {"intermediate_size": rng.choice([24, 36, 37])}
    tied = {"tie_word_embeddings": rng.random() < 0.3}
    return tiny_llama(rng.choice([1, 2]), rng.randrange(99), vocab_size=60, hidden_size=16, **odd, **tied)


MODELS = {"llama": llama, "gpt2": gpt2, "mixtral": lambda _: tiny_mixtral()}


def computed(rng, model, linears):
    in_float32 = [parametrizations.orthogonal, parametrizations.spectral_norm]  # torch has no half for these
    way = rng.choice([parametrizations.weight_norm, *(in_float32 if model.dtype == torch.float32 else [])])
    way(rng.choice(linears))


def masked(rng, model, linears):
    prune.random_unstructured(rng.choice(linears), "weight", 0.3)


def shared(rng, model, linears):
    one = rng.choice(linears)
    others = [x for x in linears if x is not one and x.weight.shape == one.weight.shape]
    if others:
        rng.choice(others).weight = one.weight


def zero(rng, model, linears):
    nn.init.zeros_(rng.choice(linears).weight)


def sparse(rng, model, linears):
    weight = rng.choice(linears).weight.data
    weight[torch.rand_like(weight) < rng.random()] = 0


def frozen(rng, model, linears):
    for linear in rng.sample(linears, k=len(linears) // 2):
        linear.weight.requires_grad_(False)


def half(rng, model, linears):
    model.to(rng.choice([torch.bfloat16, torch.float16]))


def equal(rng, model, linears):
    nn.init.constant_(rng.choice(linears).weight, 0.5)


def broken(rng, model, linears):
    rng.choice(linears).weight.data[0, 0] = rng.choice([float("nan"), float("inf")])


def packed(rng, model, linears):
    linear = rng.choice(linears)
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight.to(x.dtype), linear.bias)


CHANGES: list[Change] = [half, shared, zero, sparse, frozen, equal, broken, packed, masked, computed]  # in this order
METHODS = [
    lambda rng: Magnitude(),
    lambda rng: Wanda(),
    lambda rng: Wanda(variant=True),
    lambda rng: SparseGPT(block_size=rng.choice([4, 8, 16])),
    lambda rng: Ablate(rng.choice(["wanda", "magnitude"]), rng.choice(["sequential", "iterative"]), block_size=8),
]


def pattern(rng: random.Random) -> Unstructured | SemiStructured:
    patterns = [SemiStructured(2, 4), SemiStructured(1, 4), SemiStructured(4, 8), SemiStructured(1, 3)]
    return Unstructured(round(rng.random() * 0.95, 2)) if rng.random() < 0.5 else rng.choice(patterns)


def wishes(rng: random.Random, names: list[str]) -> dict:
    """Targets, ignored linears and an allocation, each now and then."""
    some = {
        "targets": [f"*{rng.choice(names).rpartition('.')[2]}", rng.choice(names)],
        "ignore": rng.sample(names, k=min(2, len(names))),
        "allocation": {rng.choice(names): rng.choice([0.25, 0.8, "2:4"])},
    }
    return {key: value for key, value in some.items() if rng.random() < 0.2}


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))  # also NaN and float8


def reloaded(rng: random.Random, model: nn.Module, build: Callable[[], nn.Module], folder) -> nn.Module:
    """What a file gives back: mostly of safetensors alone, now and then of the whole way out and in."""
    if rng.random() < 0.1:
        try:
            save_pretrained(model, None, folder / "model")
        except ValueError:  # a model that cannot be saved, said before anything is written
            assert not (folder / "model").exists()
        else:
            return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=model.dtype)
    save_model(model, str(folder / "weights.safetensors"))
    again = build()
    load_model(again, folder / "weights.safetensors")
    return again


def check(seed: int, folder) -> bool:
    """Prune one model; tell whether it was refused."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = rng.choice(list(MODELS))

    def build() -> nn.Module:
        inner = random.Random(seed)
        torch.manual_seed(seed)
        model = MODELS[kind](inner)
        for change in sorted(inner.sample(CHANGES, k=inner.choice([0, 1, 1, 2, 3])), key=CHANGES.index):
            linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
            if linears := [m for m in linears if "weight" in m._parameters and m.weight.dtype != torch.float8_e4m3fn]:
                change(inner, model, linears)
        return model

    model = build()
    names = [linear.name for layer in decoder_layers(model) for linear in layer.linears]
    method = rng.choice(METHODS)(rng)
    order = {"true_sequential": rng.random() < 0.5}
    before = stored(model)
    try:
        report = prune_model(model, BATCHES, method, pattern(rng), **wishes(rng, names), **order)
    except ValueError:
        after = stored(model)
        assert after.keys() == before.keys()
        assert all(same(value, after[name]) for name, value in before.items()), "changed, and then refused"
        return True
    again = reloaded(rng, model, build, folder)
    linears = {linear.name: linear for layer in decoder_layers(again, targets=["*"]) for linear in layer.linears}
    assert report.linears
    for row in report.linears:
        weight = linears[row.name].weight_OI
        zeros = sum(value == 0 for value in weight.flatten().tolist())
        assert row.sparsity == pytest.approx(zeros / weight.numel(), abs=1e-12), row.name
    for name in report.not_pruned:  # what is said to be dense has not changed
        parameter = f"{name}.weight"
        if parameter in before:
            assert same(before[parameter], model.state_dict()[parameter]), name
    return False


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("block", range(BLOCKS))
def test_the_report_is_true_or_nothing_has_changed(block, tmp_path):
    refused = 0
    for seed in range(block, DRAWS, BLOCKS):
        try:
            (folder := tmp_path / str(seed)).mkdir()
            refused += check(seed, folder)
        except Exception as error:
            raise AssertionError(f"draw {seed}: {error!r}") from error
    drawn = len(range(block, DRAWS, BLOCKS))
    assert 0 < refused < drawn or drawn < 20  # both happen
