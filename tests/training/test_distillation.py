"""Distillation: the loss against its definition, and a teacher that nothing touches."""

import copy

import pytest
import torch
from helpers import loader, tiny_llama, token_batches, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from transformers import AutoModelForCausalLM

from wanda_lightning.callbacks import WandaPruning
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.model.language_model import find_language_model
from wanda_lightning.runs import teacher as teachers
from wanda_lightning.runs.causal_lm import CausalLM
from wanda_lightning.training.distillation import Distillation, Teacher
from wanda_lightning.training.lora import LoraSettings


def loss_by_definition(student, teacher, labels, alpha: float, temperature: float) -> float:
    """Token by token, in float64, with probabilities rather than their logarithms."""
    divergence, cross_entropy, count = 0.0, 0.0, 0
    for row, other, ids in zip(student.double(), teacher.double(), labels, strict=True):
        for t in range(1, len(ids)):
            if ids[t] == -100:
                continue
            p, q = ((logits[t - 1] / temperature).softmax(0) for logits in (other, row))
            divergence += (p * (p / q).log()).sum().item()
            cross_entropy -= row[t - 1].softmax(0)[ids[t]].log().item()
            count += 1
    return alpha * temperature**2 * divergence / count + (1 - alpha) * cross_entropy / count


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (0.0, 1.0), (1.0, 1.0), (0.3, 4.0)])
def test_the_loss_is_its_definition(alpha, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 11), torch.randn(2, 7, 11) * 3
    labels = torch.randint(0, 11, (2, 7))
    labels[1, 4:] = -100
    loss = Distillation(alpha, temperature).loss(student, teacher, labels)
    assert loss.item() == pytest.approx(loss_by_definition(student, teacher, labels, alpha, temperature), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_precision_is_not_rounded_to_it(dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 11).to(dtype), (torch.randn(2, 7, 11) * 3).to(dtype)
    labels = torch.randint(0, 11, (2, 7))
    loss = Distillation(0.5, 2.0).loss(student, teacher, labels)
    assert loss.item() == pytest.approx(loss_by_definition(student, teacher, labels, 0.5, 2.0), rel=1e-5)


def test_alpha_0_is_the_models_own_loss():
    model, ids = tiny_llama(), token_batches()[0]
    out = model(ids, labels=ids)
    loss = Distillation(alpha=0.0).loss(out.logits, torch.zeros_like(out.logits), ids)
    torch.testing.assert_close(loss, out.loss)


def test_gradients_do_not_fade_with_temperature():
    """T^2 makes up for 1/T^2: for small logits the gradients are about equal."""
    torch.manual_seed(0)
    teacher, labels = torch.randn(1, 5, 9) * 0.01, torch.randint(0, 9, (1, 5))
    norms = []
    for temperature in (1.0, 8.0):
        student = torch.zeros(1, 5, 9, requires_grad=True)
        Distillation(1.0, temperature).loss(student, teacher, labels).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def distilled(folder, **settings) -> CausalLM:
    return CausalLM(
        str(folder), optimizer=lambda params: torch.optim.AdamW(params, lr=0.01), distillation=Distillation(**settings)
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_teacher_is_the_dense_model_and_nothing_changes_it(tmp_path, tiny_model_folder, lora):
    module = distilled(tiny_model_folder)
    module.lora = LoraSettings() if lora else None
    run = trainer(tmp_path, WandaPruning(sparsity=0.5))
    run.fit(module, loader())
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    teacher = module.teacher.model
    assert all(map(torch.equal, teacher.parameters(), dense.parameters()))
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert find_language_model(module) is module.model
    linear = module.model.model.layers[0].mlp.up_proj
    assert (linear.weight == 0).float().mean() == 0.5
    trained = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert trained.isdisjoint(map(id, teacher.parameters()))
    run.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert sum(t.numel() for n, t in state.items() if "lora_" not in n and n.startswith("model.")) == sum(
        t.numel() for t in dense.state_dict().values()
    )


def test_another_teacher_may_be_named(tmp_path, tiny_model_folder):
    tiny_llama(layers=1, seed=5, vocab_size=257).save_pretrained(tmp_path / "teacher")
    module = distilled(tiny_model_folder, teacher=str(tmp_path / "teacher"))
    trainer(tmp_path).fit(module, loader())
    assert len(module.teacher.model.model.layers) == 1


@pytest.mark.parametrize("named", [True, False])
def test_a_teacher_that_was_pruned_itself_is_named(tmp_path, tiny_model_folder, named, caplog):
    pruned = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    prune_model(pruned, None, "magnitude", 0.5)
    pruned.save_pretrained(tmp_path)
    teachers.load_teacher(Distillation(teacher=str(tiny_model_folder) if named else None), str(tmp_path))
    assert (f"the teacher {tmp_path} was pruned itself" in caplog.text) is not named


@pytest.mark.parametrize(("name", "asked"), [(None, {"revision": "step3000"}), ("other", {})])
def test_the_revision_is_the_models_not_that_of_another_teacher(monkeypatch, name, asked):
    given = {}
    monkeypatch.setattr(teachers, "load_model", lambda _, **kwargs: given.update(kwargs) or tiny_llama(layers=1))
    teachers.load_teacher(Distillation(teacher=name), "model", dtype="float32", revision="step3000")
    assert given == {"dtype": "float32", **asked}


def test_a_small_teacher_is_loaded_without_a_bar(tmp_path, tiny_model_folder, capsys):
    trainer(tmp_path).fit(distilled(tiny_model_folder), loader())
    assert "Loading weights" not in capsys.readouterr().err


def test_predictions_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="the teacher predicts 5 tokens, the model 4"):
        Distillation().loss(torch.zeros(1, 3, 4), torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("teacher", "message"), [("teacher", "the teacher predicts 270 tokens, the model 257"), ("none", "no folder")]
)
def test_a_teacher_that_does_not_fit_is_refused_before_pruning(tmp_path, tiny_model_folder, teacher, message):
    tiny_llama(layers=1, vocab_size=270).save_pretrained(tmp_path / "teacher")
    module = distilled(tiny_model_folder, teacher=str(tmp_path / teacher))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, WandaPruning(sparsity=0.5)).fit(module, loader())
    assert module.model is None


def test_it_brings_the_student_closer_to_the_teacher(tmp_path, tiny_model_folder):
    """More so than as many steps on the text alone do."""
    distances = {}
    for alpha in (0.0, 1.0):
        module = distilled(tiny_model_folder, alpha=alpha)
        run = trainer(tmp_path, WandaPruning(sparsity=0.5), max_steps=20, max_epochs=-1)
        run.fit(module, loader())
        ids = token_batches(seed=9)[0]
        with torch.no_grad():
            student = module.model.eval()(ids).logits
            distances[alpha] = Distillation(1.0, 1.0).loss(student, module.teacher({"input_ids": ids}).logits, ids)
    assert distances[1.0] < 0.7 * distances[0.0]


def test_a_resumed_run_loads_the_teacher_again(tmp_path, tiny_model_folder):
    def run(epochs, ckpt_path=None):
        torch.manual_seed(0)
        module = distilled(tiny_model_folder)
        callbacks = [WandaPruning(sparsity=0.5), ModelCheckpoint(tmp_path, filename=f"{epochs}")]
        settings = {"max_steps": -1, "max_epochs": epochs, "enable_checkpointing": True}
        trainer(tmp_path, *callbacks, **settings).fit(module, loader(), ckpt_path=ckpt_path)
        return module

    whole, _ = run(2), run(1)
    resumed = run(2, tmp_path / "1.ckpt")
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_copies_of_the_module_share_the_teacher(tmp_path, tiny_model_folder):
    teacher = Teacher(tiny_llama(layers=1), Distillation())
    assert copy.deepcopy(teacher) is teacher
    module = distilled(tiny_model_folder)
    callbacks = [EMAWeightAveraging(decay=0.5), WandaPruning(sparsity=0.5)]
    trainer(tmp_path, *callbacks).fit(module, loader())
    assert (module.model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be a number in \[0, 1\], got 1.5"),
        ({"alpha": "half"}, r"alpha must be a number in \[0, 1\], got 'half'"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a finite number above 0, got nan"),
        ({"teacher": torch.nn.Linear(1, 1)}, "teacher must be the name, folder or .* got Linear"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)
