"""Distillation on hidden states: the error against its definition, and which layers are compared with which."""

import pytest
import torch
from helpers import loader, tiny_llama, token_batches, trainer

from wanda_lightning.callbacks import DepthPruning, WidthPruning
from wanda_lightning.report.shrinking import ShrinkReport, hidden_states_kept
from wanda_lightning.runs.causal_lm import CausalLM
from wanda_lightning.training.distillation import Distillation, Teacher
from wanda_lightning.training.hidden_states import hidden_state_error

IDS = token_batches()[0]
LAYERS = "model.layers"


@torch.no_grad()
def what_enters(model, ids):
    """What enters each layer and the head, by plain hooks, a list of (B, T, D) in float64."""
    seen, hooks = [], []
    for module in (*model.model.layers, model.lm_head):
        hooks.append(module.register_forward_pre_hook(lambda _, args: seen.append(args[0].double())))
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def error_by_definition(student, teacher, real):
    """Layer by layer and token by token."""
    errors = []
    for s, t in zip(student, teacher, strict=True):
        tokens = [
            sum((s[b, i] - t[b, i]) ** 2).item() / sum(t[b, i] ** 2).item()
            for b in range(s.shape[0])
            for i in range(s.shape[1])
            if real[b, i]
        ]
        errors.append(sum(tokens) / len(tokens))
    return sum(errors) / len(errors)


def test_the_error_is_its_definition():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4) * torch.tensor([1, 10, 100]).view(3, 1, 1, 1)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    expected = error_by_definition(student.double(), teacher.double(), real)
    assert hidden_state_error([*student], [*teacher], real).item() == pytest.approx(expected, rel=1e-5)
    scaled = hidden_state_error([*student * 7], [*teacher * 7], real)
    assert scaled.item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_measured_in_single():
    torch.manual_seed(0)
    student, teacher = (300 * torch.randn(1, 2, 5, 64)).half(), (300 * torch.randn(1, 2, 5, 64)).half()
    real = torch.ones(2, 5, dtype=torch.bool)  # squares of 300 overflow
    expected = error_by_definition(student.double(), teacher.double(), real)
    assert hidden_state_error([*student], [*teacher], real).item() == pytest.approx(expected, rel=1e-5)


def test_a_token_that_is_zero_in_both_has_no_error():
    student, teacher = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    assert hidden_state_error([student], [teacher], torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(1 / 8)


def test_a_worked_example():
    """(3, 4) for (0, 5): squared distance 9 + 1, of 25; (1, 0) for (2, 0): 1 of 4; padding is not seen."""
    student = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[0.0, 5.0], [2.0, 0.0], [0.0, 0.0]]])
    error = hidden_state_error([student], [teacher], torch.tensor([[True, True, False]]))
    assert error.item() == pytest.approx((10 / 25 + 1 / 4) / 2)


def loss(model, teacher, kept=None, **settings):
    return Teacher(teacher, Distillation(**settings), kept).loss(model, {"input_ids": IDS}, IDS)


def test_a_model_does_not_differ_from_itself():
    model = tiny_llama()
    assert loss(model, tiny_llama(), alpha=1.0, hidden_states=1.0).item() == pytest.approx(0, abs=1e-6)
    settings = {"alpha": 0.3, "temperature": 1.0}
    assert torch.equal(loss(model, tiny_llama(), hidden_states=5.0, **settings), loss(model, tiny_llama(), **settings))


def test_the_loss_is_that_on_predictions_and_the_error_times_its_weight():
    model, dense = tiny_llama(seed=1), tiny_llama()
    error = error_by_definition(what_enters(model, IDS), what_enters(dense, IDS), torch.ones_like(IDS))
    plain = loss(model, dense).item()
    assert loss(model, dense, hidden_states=0.25).item() == pytest.approx(plain + 0.25 * error, rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama(seed=1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss(model, tiny_llama(), hidden_states=1.0).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.fixture
def with_idle_layer(tmp_path):
    """A folder with a model of four layers, of which the second passes everything on as it is."""
    model = tiny_llama(layers=4, vocab_size=257)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def distilled(folder, *callbacks, steps=1, **settings):
    module = CausalLM(
        str(folder),
        distillation=Distillation(**settings),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.003),
    )
    run = trainer(folder.parent, *callbacks, max_steps=steps, max_epochs=-1)
    run.fit(module, loader())
    return module, run


def test_layers_that_remain_are_compared_with_what_they_were(with_idle_layer):
    """Without the idle layer all is as before; any other correspondence would see a difference."""
    module, run = distilled(with_idle_layer, DepthPruning(layers=1), alpha=1.0, hidden_states=1.0)
    assert module.teacher.kept == [0, 2, 3, 4]
    assert run.callback_metrics["train/loss"].item() == pytest.approx(0, abs=1e-6)


def test_after_width_pruning_every_layer_is_compared_with_itself(tiny_model_folder):
    module, run = distilled(tiny_model_folder, WidthPruning(keep=0.5), alpha=0.0, hidden_states=1.0)
    assert module.teacher.kept is None
    plain, _ = distilled(tiny_model_folder, WidthPruning(keep=0.5, overwrite=True), steps=0)
    ids = next(iter(loader()))["input_ids"]
    dense = module.teacher.model
    error = error_by_definition(what_enters(plain.model.eval(), ids), what_enters(dense, ids), torch.ones_like(ids))
    own = plain.model(ids, labels=ids).loss.item()
    assert run.callback_metrics["train/loss"].item() == pytest.approx(own + error, rel=1e-4)


def test_hidden_states_come_closer_than_without(tiny_model_folder):
    errors = []
    for weight in (0.0, 5.0):
        callbacks = WidthPruning(keep=0.5, overwrite=True), DepthPruning(layers=1)
        module, _ = distilled(tiny_model_folder, *callbacks, steps=30, hidden_states=weight)
        ids = token_batches(seed=9)[0]
        states = what_enters(module.teacher.model, ids)
        states = [states[number] for number in module.teacher.kept]
        errors.append(error_by_definition(what_enters(module.model.eval(), ids), states, torch.ones_like(ids)))
    assert errors[1] < 0.8 * errors[0]


def test_layers_taken_out_twice_are_numbered_as_at_first():
    def step(kept, before):
        gone = [f"{LAYERS}.{n}" for n in range(before) if n not in kept]
        return ShrinkReport("layers", {}, gone=gone, kept=kept)

    narrower = ShrinkReport("neurons", {}, kept=[[64, 32]])
    assert hidden_states_kept([narrower]) is None
    assert hidden_states_kept([step([0, 2, 3, 5], 6), narrower, step([0, 3], 4)]) == [0, 5, 6]


@pytest.mark.parametrize(
    ("teacher", "kept", "message"),
    [
        ({"layers": 4}, None, "the teacher has 4 layers, the model 3, made of 3: hidden states can only be compared"),
        ({"layers": 5}, [0, 1, 3, 4], "the teacher has 5 layers, the model 3, made of 4"),
        ({"layers": 3}, [0, 1, 3], "the teacher has 3 layers, the model 3"),
        ({"hidden_size": 64}, None, "the teacher's hidden size is 64, the model's 32"),
    ],
)
def test_a_teacher_that_cannot_be_compared_with_is_refused(teacher, kept, message):
    with pytest.raises(ValueError, match=message):
        loss(tiny_llama(), tiny_llama(**teacher), kept, hidden_states=1.0)
    assert loss(tiny_llama(), tiny_llama(**teacher), kept).isfinite()


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match="hidden_states must be a finite number of at least 0, got"):
        Distillation(hidden_states=weight)
