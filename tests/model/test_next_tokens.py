"""Which tokens are predicted: the same whether sequences are padded, and on which side."""

import pytest
import torch
from helpers import tiny_llama, trainer
from torch.utils.data import DataLoader

from wanda_lightning import CausalLM, LeastLoss, prune_depth, prune_model
from wanda_lightning.calibration.token_losses import token_losses
from wanda_lightning.evaluation import Perplexity
from wanda_lightning.model.next_tokens import inputs_and_labels
from wanda_lightning.training.distillation import Distillation, Teacher

SIDES = ["right", "left"]


def sequences(*lengths):
    return [torch.randint(1, 250, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths or (5, 17, 30, 9)]


def padded(rows, side="right"):
    """One batch; padding has ids like any other token."""
    length = max(map(len, rows))
    ids_BT = torch.full((len(rows), length), 7)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
    for ids_T, mask_T, row in zip(ids_BT, mask_BT, rows, strict=True):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids_T[place], mask_T[place] = row, 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def packed(rows):
    """All sequences in one row; their positions tell where each begins."""
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }


def losses_by_transformers(model, rows):
    """The loss of every token, each sequence alone."""
    with torch.no_grad():
        return [
            -model(row[None]).logits[0, :-1].double().log_softmax(-1)[torch.arange(len(row) - 1), row[1:]]
            for row in rows
        ]


def test_positions_in_images_say_nothing_of_where_sequences_begin():
    ids_BT = torch.arange(1, 9).view(2, 4)
    inputs, labels_BT = inputs_and_labels({"input_ids": ids_BT, "position_ids": torch.zeros(3, 2, 4).long()})
    assert torch.equal(labels_BT, ids_BT)
    assert inputs["position_ids"].shape == (3, 2, 4)


def test_a_mask_of_who_sees_whom_is_refused():
    mask_B1TT = torch.ones(2, 1, 4, 4).tril().bool()
    with pytest.raises(ValueError, match=r"shape .*\(2, 4\), 0 where there is padding, got \(2, 1, 4, 4\)"):
        inputs_and_labels({"input_ids": torch.ones(2, 4).long(), "attention_mask": mask_B1TT})


@pytest.mark.parametrize("side", SIDES)
def test_the_losses_of_tokens_are_those_of_each_sequence_alone(llama, side):
    rows = sequences()
    with torch.no_grad():
        found = list(token_losses(llama, [padded(rows, side)]))
    for losses, expected in zip(found, losses_by_transformers(llama, rows), strict=True):
        torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)


def test_losses_of_a_model_in_half_precision_are_computed_in_single(llama):
    rows = sequences(30)
    with torch.no_grad():
        (losses,) = token_losses(llama.bfloat16(), [rows[0][None]])
    torch.testing.assert_close(losses.double(), losses_by_transformers(llama, rows)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_perplexity_is_that_of_each_sequence_alone(llama, side):
    rows, metric = sequences(), Perplexity()
    metric.update_from(llama, *inputs_and_labels(padded(rows, side)))
    expected = torch.cat(losses_by_transformers(llama, rows)).mean().exp()
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-5)


def test_sequences_in_one_row_count_as_each_alone(llama):
    rows, metric = sequences(), Perplexity()
    expected = torch.cat(losses_by_transformers(llama, rows))
    with torch.no_grad():
        (found,) = token_losses(llama, [packed(rows)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    metric.update_from(llama, *inputs_and_labels(packed(rows)))
    assert metric.compute().item() == pytest.approx(expected.mean().exp().item(), rel=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_layers_go_by_the_same_losses(side):
    rows = sequences()
    alone = prune_depth(tiny_llama(), [row[None] for row in rows], 1, choice="loss")
    together = prune_depth(tiny_llama(), [padded(rows, side)], 1, choice="loss")
    assert together.figures == pytest.approx(alone.figures, rel=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_hidden_states_are_compared_at_every_token_that_is_no_padding(llama, side):
    rows, student = sequences(), tiny_llama(seed=1)
    teacher = Teacher(llama, Distillation(alpha=0.0, hidden_states=1.0))
    with torch.no_grad():
        states = [
            [model(row[None], output_hidden_states=True).hidden_states for row in rows] for model in (student, llama)
        ]
        errors = [
            ((torch.cat(own, 1) - torch.cat(dense, 1)).square().sum(-1) / torch.cat(dense, 1).square().sum(-1)).mean()
            for own, dense in zip(*(zip(*each, strict=True) for each in states), strict=True)
        ]
        expected = torch.cat(losses_by_transformers(student, rows)).mean() + torch.stack(errors).mean()
        found = teacher.loss(student, *inputs_and_labels(padded(rows, side)))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_token_ids_alone_are_a_batch():
    ids_BT = torch.stack(sequences(9, 9))
    for batch in (ids_BT, [ids_BT], (ids_BT,)):
        inputs, labels_BT = inputs_and_labels(batch)
        assert [*inputs] == ["input_ids"]
        assert inputs["input_ids"] is labels_BT is ids_BT
    with pytest.raises(ValueError, match="a mapping that holds input_ids"):  # which of two are labels is not known
        inputs_and_labels([ids_BT, ids_BT])


def chat():
    """A batch as transformers' collators make it: labels of its own, -100 in the prompts."""
    batch = padded(sequences(12, 9))
    labels_BT = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels_BT[:, :4] = -100
    return {**batch, "labels": labels_BT}


def test_training_takes_the_labels_of_a_batch(tiny_model_folder, tmp_path):
    module, run = CausalLM(str(tiny_model_folder)), trainer(tmp_path, max_steps=1, max_epochs=-1)
    module.configure_model()
    with torch.no_grad():
        expected = module.model(**chat()).loss
    run.fit(module, DataLoader([chat()], batch_size=None))
    assert run.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_validation_takes_the_labels_of_a_batch(tiny_model_folder, tmp_path):
    module = CausalLM(str(tiny_model_folder))
    module.configure_model()
    with torch.no_grad():
        expected = module.model(**chat()).loss.exp()
    (metrics,) = trainer(tmp_path).validate(module, DataLoader([chat()], batch_size=None), verbose=False)
    assert metrics["val/perplexity"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "choose",
    [
        lambda model, batches: prune_depth(model, batches, 1, choice="loss"),
        lambda model, batches: prune_model(model, batches, "wanda", 0.5, allocation=LeastLoss()),
    ],
    ids=["depth", "least loss"],
)
def test_sequences_that_predict_nothing_are_refused(llama, choose):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    with pytest.raises(ValueError, match="predict nothing: they need at least 2 tokens each"):
        choose(llama, [torch.tensor([[5]]), torch.tensor([[6]])])
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
