"""The method as the engine uses it: on models, with exact patterns; what the solver does is in tests/solvers."""

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral, token_batches
from transformers import GPT2Config, GPT2LMHeadModel

from wanda_lightning import ADMM, RIA, SemiStructured, SparseGPT, Unstructured, Wanda, prune_model
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.sparsity import max_kept_per_group

METHODS = [ADMM(), RIA(), Wanda(refine=10), SparseGPT(refine=10)]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("make", [tiny_llama, gpt2, tiny_mixtral])
@pytest.mark.parametrize(
    ("pattern", "dtype"), [(Unstructured(0.5), torch.float32), (SemiStructured(2, 4), torch.bfloat16)]
)
def test_linears_conv1d_and_fused_experts_of_a_model(make, method, pattern, dtype):
    model = make().to(dtype)
    report = prune_model(model, token_batches(), method, pattern)
    linears = [linear for layer in decoder_layers(model) for linear in layer.linears]
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    for linear in linears:
        assert linear.weight_OI.isfinite().all()
        if pattern == SemiStructured(2, 4):
            assert max_kept_per_group(linear.weight_OI != 0, 4) == 2


def test_errors_in_the_report_fall_from_wanda_to_admm(batches):
    errors = [
        sum(
            row.error for row in prune_model(tiny_llama(), batches, method, Unstructured(0.5), exact_error=True).linears
        )
        for method in (Wanda(), Wanda(refine=20), ADMM())
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 30.0}, r"steps must be a whole number of at least 1, got 30\.0"),
        ({"rho": 0}, "rho must be a finite number above 0, got 0"),
        ({"damping": float("nan")}, "damping must be a finite number above 0, got nan"),
        ({"refine": -1}, "refine must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ADMM(**settings)


def test_prints_its_settings():
    assert str(ADMM()) == "ADMM(steps=40, rho=1.0, damping=0.01, refine=10)"
    assert str(ADMM(refine=0)).endswith("refine=0)")
