"""All runs on an Apple GPU, which has no float64, as it does on the CPU. The GPU is a stand-in: see apple_gpu.py."""

import pytest
import torch
from apple_gpu import APPLE_GPU, apple_gpu, values_of, without_apple_gpu
from helpers import SomebodysData, SomebodysModule, few_windows, sparsities, tiny_llama, token_batches, trainer
from lightning.fabric.accelerators import mps
from test_families import build
from torch.utils._pytree import tree_map

from wanda_lightning import (
    ADMM,
    ATP,
    OWL,
    RIA,
    Ablate,
    CausalLM,
    Distillation,
    Gradual,
    LeastLoss,
    LoraSettings,
    Magnitude,
    Reconstruction,
    SemiStructured,
    SparseFinetuning,
    SparseGPT,
    SparseGPTPruning,
    Unstructured,
    Wanda,
    WandaPruning,
    WidthPruning,
    prune_depth,
    prune_model,
    prune_width,
)
from wanda_lightning.engine import checks
from wanda_lightning.evaluation import Perplexity

BATCHES = token_batches(batches=3)


@pytest.fixture(autouse=True)
def has_apple_gpu(monkeypatch):
    """Weights of another class than torch's own would be refused as quantised; Lightning finds the GPU."""
    monkeypatch.setattr(checks, "_check_stored", lambda linear: None)
    monkeypatch.setattr(mps.MPSAccelerator, "is_available", staticmethod(lambda: True))
    with apple_gpu():
        yield


def both(here, on_cpu) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weights of two models; those that one shares in the other, too, which moving to the stand-in undoes."""
    found = dict(here.named_parameters())
    return [(values_of(found[name]), expected.detach()) for name, expected in on_cpu.named_parameters()]


def test_the_stand_in_refuses_what_the_gpu_cannot_do():
    here = torch.ones(2, device=APPLE_GPU)
    with pytest.raises(TypeError, match="float64"):
        here.double()
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(2, dtype=torch.float64, device=APPLE_GPU)
    with pytest.raises(RuntimeError, match="same device"):
        here + torch.ones(2)
    with pytest.raises(NotImplementedError, match="mode"):
        here.mode()
    assert (here + 1).device == APPLE_GPU
    assert (here + 1).tolist() == [2, 2]
    assert type(here.cpu().double()) is torch.Tensor


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
@pytest.mark.parametrize("method", [Magnitude(), Wanda(), RIA(), SparseGPT(), Ablate()], ids=str)
def test_methods(method, pattern):
    here, on_cpu = tiny_llama().to(APPLE_GPU), tiny_llama()
    prune_model(here, BATCHES, method, pattern)
    prune_model(on_cpu, BATCHES, method, pattern)
    for ours, expected in both(here, on_cpu):
        assert torch.equal(ours == 0, expected == 0)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        Wanda(refine=2),
        RIA(),
        ADMM(steps=2),
        SparseGPT(),
        *(Ablate(by, how) for by in ("wanda", "magnitude") for how in ("sequential", "iterative")),
    ],
    ids=str,
)
def test_a_statistic_may_be_on_another_device_than_the_weight(method, pattern):
    on_cpu, statistic = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), method.statistic(16)
    statistic.update(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)))
    here = on_cpu.to(APPLE_GPU)
    mask = method.prune(here, statistic, pattern)
    assert torch.equal(values_of(mask), method.prune(on_cpu, statistic, pattern))
    torch.testing.assert_close(values_of(here), on_cpu)


@pytest.mark.parametrize("family", ["GPT-2", "Falcon (ALiBi)", "Mixtral", "GPT-OSS", "Mamba 2", "Qwen3-Next"])
def test_families(family):
    here, on_cpu = build(family).to(APPLE_GPU), build(family)
    for model in (here, on_cpu):
        prune_model(model, token_batches(batches=2, vocab=60), Wanda(), 0.5)
    for ours, expected in both(here, on_cpu):
        assert torch.equal(ours == 0, expected == 0)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (Wanda(variant=True), {}),
        (Wanda(refine=3), {}),
        (Wanda(), {"exact_error": True}),
        (Wanda(), {"true_sequential": False}),
        (Wanda(), {"activations": "cpu"}),
        (Wanda(), {"activations": "disk"}),
        (Wanda(), {"allocation": OWL()}),
        (Wanda(), {"allocation": ATP()}),
        (Wanda(), {"allocation": LeastLoss()}),
        (SparseGPT(), {"dense_target": True}),
        (SparseGPT(), {"reconstruction": Reconstruction(epochs=1)}),
        (SparseGPT(), {"pattern": "2:4", "permute": True}),
        (ADMM(), {}),
    ],
    ids=str,
)
def test_settings(method, settings):
    """Where rounding decides more, as with ADMM, errors are compared in place of weights."""
    settings = {"pattern": 0.5, **settings}
    here = prune_model(tiny_llama().to(APPLE_GPU), BATCHES, method, **settings)
    on_cpu = prune_model(tiny_llama(), BATCHES, method, **settings)
    assert here.sparsity == pytest.approx(on_cpu.sparsity, abs=1e-3)
    assert [row.error for row in here.linears] == pytest.approx([row.error for row in on_cpu.linears], rel=0.1)


def move_inputs(module, args, kwargs):
    """What accelerate's hooks do where the parts of a model are on several devices."""
    move = lambda each: each.to(APPLE_GPU) if isinstance(each, torch.Tensor) else each  # noqa: E731
    return tree_map(move, (args, kwargs))


def test_the_dense_model_is_aimed_at_where_layers_are_on_two_devices():
    here = tiny_llama()
    for part in (*here.model.layers[1:], here.model.norm, here.lm_head):
        part.to(APPLE_GPU).register_forward_pre_hook(move_inputs, with_kwargs=True)
    reports = [prune_model(model, BATCHES, SparseGPT(), 0.5, dense_target=True) for model in (here, tiny_llama())]
    errors, expected = ([row.error for row in report.linears] for report in reports)
    assert errors == pytest.approx(expected, rel=1e-3)


def test_smaller_models():
    here, on_cpu = tiny_llama().to(APPLE_GPU), tiny_llama()
    for model in (here, on_cpu):
        prune_width(model, BATCHES, 0.5, attention_keep=0.5)
        prune_depth(model, BATCHES, 1)
        prune_depth(model, BATCHES, 1, choice="loss")
    for ours, expected in both(here, on_cpu):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_perplexity_is_summed_in_float64_all_the_same():
    model, ids, metric = tiny_llama(), BATCHES[0], Perplexity()
    metric.update_from(model, {"input_ids": ids}, ids)
    expected = metric.compute()
    metric.reset()
    metric.to(APPLE_GPU).update_from(model.to(APPLE_GPU), {"input_ids": ids.to(APPLE_GPU)}, ids.to(APPLE_GPU))
    assert metric.tokens.device == APPLE_GPU
    assert metric.compute().device == APPLE_GPU
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)
    metric.to("cpu").update_from(tiny_llama(), {"input_ids": ids}, ids)
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("callbacks", "settings"),
    [
        ([WandaPruning(0.5)], {}),
        ([SparseGPTPruning(0.5)], {"precision": "bf16-mixed"}),
        ([WandaPruning(0.5), SparseFinetuning()], {}),
        ([WandaPruning(0.5, schedule=Gradual(0, 2))], {}),
        ([WidthPruning(0.5), WandaPruning(0.5)], {}),
    ],
)
def test_a_trainer_takes_it(callbacks, settings, tmp_path):
    module, data = SomebodysModule(), SomebodysData()
    run = trainer(tmp_path, *callbacks, accelerator="mps", devices=1, **settings)
    run.fit(module, data)
    assert run.strategy.root_device == APPLE_GPU
    assert sparsities(module) == {0.5}


@pytest.mark.parametrize(
    "settings", [{}, {"distillation": Distillation(hidden_states=1.0)}, {"lora": LoraSettings(rank=2)}], ids=str
)
def test_validation_before_and_after(settings, tiny_model_folder, tmp_path):
    module = CausalLM(str(tiny_model_folder), **settings)
    with without_apple_gpu():
        module.configure_model()
    run = trainer(tmp_path, WandaPruning(0.5), accelerator="mps", devices=1)
    (before,) = run.validate(module, few_windows(), verbose=False)
    run.fit(module, few_windows())
    (after,) = run.validate(module, few_windows(), verbose=False)
    assert before["val/perplexity"] != after["val/perplexity"]
