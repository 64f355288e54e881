"""What a pruning kept of a layer is trained towards the dense layer: least squares, and what must not change."""

import copy
import re

import pytest
import torch
from crashing import CrashError, Crashing
from helpers import digests, tiny_llama, tiny_mixtral, token_batches
from least_squares import normal_equations
from torch import nn
from transformers import AutoModelForCausalLM

from wanda_lightning import Magnitude, Reconstruction, SemiStructured, SparseGPT, Unstructured, Wanda, prune_model
from wanda_lightning.calibration.walk import walk
from wanda_lightning.checkpoints.loading import load_streamed
from wanda_lightning.engine import reconstruction
from wanda_lightning.engine.journal import Journal
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.offload import stored_parameters

HALF = Unstructured(0.5)
FAST = Reconstruction(epochs=2, lr=2e-3)
BATCHES = token_batches(batches=4)


def pruned(model, method=None, pattern=HALF, batches=BATCHES, **settings):
    """Prune a model with reconstruction, unless told otherwise; return it and the report."""
    settings = {"reconstruction": FAST} | settings
    return model, prune_model(model, batches, method or Wanda(), pattern, **settings)


def differing(one, other) -> list[str]:
    others = other.state_dict()
    return [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, others[name])]


class OneLinear(nn.Module):
    """A decoder layer that is a matrix."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32, bias=False)

    def forward(self, hidden_states, **_):
        return self.linear(hidden_states)


@torch.no_grad()
def test_layers_that_are_matrices_reach_the_least_squares_solution():
    model = tiny_llama(layers=2)
    model.model.layers = nn.ModuleList([OneLinear(), OneLinear()])
    dense = copy.deepcopy(model)
    some, other = token_batches(batches=2, batch_size=4)
    batches = [some, other, torch.cat([some, other])]  # the third is held out: it measures what is trained on
    thorough = Reconstruction(epochs=300, lr=5e-3, held_out=1 / 3)
    _, report = pruned(model, batches=batches, reconstruction=thorough)

    x_TI = model.model.embed_tokens(batches[2]).flatten(0, 1).double()
    y_TO = x_TI
    for layer, dense_layer in zip(model.model.layers, dense.model.layers, strict=True):
        trained_OI, dense_OI = layer.linear.weight.double(), dense_layer.linear.weight.double()
        y_TO = y_TO @ dense_OI.t()
        weight_T1 = 1 / y_TO.square().sum(1, keepdim=True)
        # All rows at the dense target: the solver wants weights that give it, so solve for those without a mask first.
        hessian_II, wanted_IO = x_TI.t() @ (weight_T1 * x_TI), x_TI.t() @ (weight_T1 * y_TO)
        full_OI = torch.linalg.solve(hessian_II, wanted_IO).t()
        best_OI = normal_equations(torch.zeros_like(trained_OI), full_OI, trained_OI != 0, hessian_II)
        errors = [
            float((weight_T1 * (x_TI @ w_OI.t() - y_TO) ** 2).sum()) / len(x_TI) for w_OI in (trained_OI, best_OI)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)
        torch.testing.assert_close(trained_OI, best_OI, atol=0.01, rtol=0)
        x_TI = x_TI @ trained_OI.t()
    layers = list(report.reconstruction.values())
    assert layers[-1].after == pytest.approx(errors[0], rel=1e-4)
    assert all(layer.after < layer.before for layer in layers)


def test_trained_as_by_hand():
    """By Adam, each batch's mean over its tokens, with a learning rate that falls linearly to 0."""
    model = tiny_llama(layers=1)
    model.model.layers = nn.ModuleList([OneLinear()])
    dense_OI, steps = model.model.layers[0].linear.weight.detach().clone(), 4
    many, few = token_batches(batches=2, batch_size=8)
    batches = [many, few[:1], torch.cat([many, few[:1]])]  # the third is held out: it measures what is trained on
    _, report = pruned(model, batches=batches, reconstruction=Reconstruction(epochs=steps // 2, lr=0.01))
    trained_OI = model.model.layers[0].linear.weight.detach()

    mask_OI = trained_OI != 0
    weight_OI = (dense_OI * mask_OI).requires_grad_()
    adam = torch.optim.Adam([weight_OI])
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        x_TI = model.model.embed_tokens(batches[step % 2]).detach().flatten(0, 1)
        y_TO = x_TI @ dense_OI.t()
        error_T = (x_TI @ (weight_OI * mask_OI).t() - y_TO).square().sum(1) / y_TO.square().sum(1)
        adam.zero_grad()
        (1000 * error_T.mean()).backward()
        adam.step()
    assert report.reconstruction["model.layers.0"].epochs == steps // 2
    torch.testing.assert_close(trained_OI, weight_OI.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("true_sequential", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral, lambda: tiny_llama().bfloat16()])
@pytest.mark.parametrize(
    ("method", "pattern"), [(Magnitude(), HALF), (SparseGPT(block_size=16), SemiStructured(2, 4))], ids=str
)
def test_the_error_falls_and_zeros_stay(build, method, pattern, true_sequential):
    settings = {"true_sequential": true_sequential}
    model, report = pruned(build(), method, pattern, **settings)
    alone, _ = pruned(build(), method, pattern, reconstruction=None, **settings)
    assert {row.sparsity for row in report.linears} == {0.5}
    first, *rest = report.reconstruction.values()
    assert first.after < first.before
    assert all(layer.after <= layer.before for layer in rest)
    for number, (layer, other) in enumerate(zip(decoder_layers(model), decoder_layers(alone), strict=True)):
        for linear, untrained in zip(layer.linears, other.linears, strict=True):
            if isinstance(pattern, SemiStructured):
                assert ((linear.weight_OI != 0).unflatten(1, (-1, 4)).sum(2) == 2).all(), linear.name
            if number == 0:  # later layers are fed by trained ones
                assert torch.equal(linear.weight_OI == 0, untrained.weight_OI == 0), linear.name
    assert model.dtype == alone.dtype
    names = {linear.parameter_name for layer in decoder_layers(model) for linear in layer.linears}
    assert set(differing(model, alone)) <= names


@pytest.mark.parametrize("true_sequential", [False, True])
def test_weights_that_did_not_get_better_are_put_back(true_sequential):
    settings = {"true_sequential": true_sequential}
    model, report = pruned(tiny_llama(), reconstruction=Reconstruction(lr=100.0), **settings)
    alone, _ = pruned(tiny_llama(), reconstruction=None, **settings)
    assert {layer.epochs for layer in report.reconstruction.values()} == {0}
    assert all(layer.after == layer.before for layer in report.reconstruction.values())
    assert differing(model, alone) == []


def test_only_what_this_pruning_removed_stays_zero():
    model = tiny_llama()
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data.zero_()
    _, report = pruned(model, batches=token_batches(batches=16), reconstruction=Reconstruction(lr=5e-4))
    rows = {row.name: row for row in report.linears}
    assert rows["model.layers.0.self_attn.o_proj"].sparsity == 0.5
    assert ((weight == 0).sum(1) == 16).all()


@torch.no_grad()
def test_the_second_stream_is_that_of_the_dense_model():
    model = tiny_llama()
    batch = {"input_ids": BATCHES[0], "attention_mask": torch.ones_like(BATCHES[0])}
    batch["attention_mask"][0, :5] = 0
    *wanted, last = copy.deepcopy(model)(**batch, output_hidden_states=True).hidden_states[1:]
    for step in walk(model, decoder_layers(model), [batch], with_dense=True):
        if wanted:
            assert torch.equal(step.dense_BTD[0], wanted.pop(0))
        else:
            assert torch.equal(model.model.norm(step.dense_BTD[0]), last)
        for linear in step.layer.linears:
            linear.weight_OI.zero_()


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_a_run_that_goes_on_ends_with_the_same_bytes(streamed, tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    before = digests(tmp_path / "dense")
    whole, wanted = pruned(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), Crashing.__base__())
    monkeypatch.setattr(Crashing, "__str__", lambda _: str(Wanda()))
    load = load_streamed if streamed else AutoModelForCausalLM.from_pretrained
    for limit in (10, 1000):
        Crashing.limit = limit
        journal = Journal(tmp_path / "journal")
        try:
            model, report = pruned(load(str(tmp_path / "dense")), Crashing(), journal=journal)
        except CrashError:
            assert limit == 10
        finally:
            journal.release()
    assert Crashing.limit == 1000 - 14  # the first of three layers was finished
    found = dict(stored_parameters(model))
    assert all(torch.equal(found[name], tensor) for name, tensor in stored_parameters(whole))
    assert digests(tmp_path / "dense") == before
    layers = [(layer.before, layer.after, layer.epochs) for layer in report.reconstruction.values()]
    assert layers == [(layer.before, layer.after, layer.epochs) for layer in wanted.reconstruction.values()]


def test_journals_know_the_setting(tmp_path):
    journal = Journal(tmp_path)
    pruned(tiny_llama(), reconstruction=None, journal=journal)
    assert "reconstruction" not in (tmp_path / "run.json").read_text()  # as older versions wrote it
    with pytest.raises(ValueError, match=re.escape("reconstruction: None there, 'Reconstruction(epochs=2, ")):
        pruned(tiny_llama(), journal=journal)
    journal.release()


def test_steps_too_small_for_half_precision_add_up():
    small = Reconstruction(epochs=1, lr=2e-4)
    batches = token_batches(batches=16)
    half, single = (tiny_llama(layers=1).bfloat16().to(dtype) for dtype in (torch.bfloat16, torch.float32))
    alone = copy.deepcopy(half)
    for model in (half, single):
        pruned(model, Magnitude(), batches=batches, reconstruction=small)
    pruned(alone, Magnitude(), batches=batches, reconstruction=None)
    name = "model.layers.0.mlp.down_proj.weight"
    start = alone.state_dict()[name].float()
    updates = [model.state_dict()[name].float() - start for model in (half, single)]
    assert torch.nn.functional.cosine_similarity(*[update.flatten() for update in updates], dim=0) > 0.5


def test_experts_that_are_not_pruned_are_not_trained():
    dense, model = tiny_mixtral(), tiny_mixtral()
    pruned(model, targets=["*.experts.down_proj.1", "*.experts.gate_up_proj.1"])
    for layer, before in zip(model.model.layers, dense.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weights, dense_weights = getattr(layer.mlp.experts, name), getattr(before.mlp.experts, name)
            assert [torch.equal(weights[e], dense_weights[e]) for e in range(4)] == [True, False, True, True]


class TwoExperts(nn.Module):
    """A decoder layer whose expert is chosen by the first token of a batch."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, hidden_states, **_):
        return hidden_states + self.experts[int(hidden_states[0, 0, 0] > 0)](hidden_states)


def test_a_batch_that_reaches_no_pruned_expert_trains_nothing():
    model = tiny_llama(layers=1)
    model.model.layers = nn.ModuleList([TwoExperts()])
    batches = [BATCHES[0].clone() for _ in range(4)]
    for batch, token in zip(batches, model.model.embed_tokens.weight[:, 0].topk(2).indices.tolist(), strict=False):
        batch[0, 0] = token  # the first two go to the second expert
    for batch in batches[2:]:
        batch[0, 0] = model.model.embed_tokens.weight[:, 0].argmin()
    _, report = pruned(model, targets=["*.experts.0"], batches=batches)
    assert report.reconstruction["model.layers.0"].after < report.reconstruction["model.layers.0"].before


def test_padding_does_not_count():
    ids = token_batches(batches=3, batch_size=1, length=16)
    padded = []
    for batch in ids:
        mask = torch.ones(1, 20, dtype=torch.long)
        mask[:, 16:] = 0
        padded.append({"input_ids": torch.cat([batch, torch.full((1, 4), 7)], 1), "attention_mask": mask})
    (plain, report), (other, of_padded) = (pruned(tiny_llama(), batches=batches) for batches in (ids, padded))
    for name, layer in report.reconstruction.items():
        assert of_padded.reconstruction[name].before == pytest.approx(layer.before, rel=1e-5)
        assert of_padded.reconstruction[name].after == pytest.approx(layer.after, rel=1e-3)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, atol=1e-3, rtol=0)


def test_where_activations_wait_does_not_matter():
    models = [pruned(tiny_llama(), activations=place)[0] for place in ("device", "cpu", "disk")]
    assert differing(models[0], models[1]) == differing(models[0], models[2]) == []


def test_the_model_is_left_as_found():
    model = tiny_llama().train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad = False
    gradient = torch.ones(32, 64)
    model.model.layers[0].mlp.down_proj.weight.grad = gradient
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    random = torch.get_rng_state()
    pruned(model)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage
    assert [p.grad for p in model.parameters() if p.grad is not None] == [gradient]
    assert torch.equal(gradient, torch.ones(32, 64))
    assert torch.equal(torch.get_rng_state(), random)


def test_same_inputs_give_the_same_bytes():
    assert differing(pruned(tiny_mixtral())[0], pruned(tiny_mixtral())[0]) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"lr": 0}, "lr must be a finite number above 0"),
        ({"lr": float("nan")}, "lr must be a finite number above 0"),
        ({"held_out": 0}, r"held_out must be a number in \(0, 0.5\], got 0"),
        ({"held_out": 0.6}, r"held_out must be a number in \(0, 0.5\], got 0.6"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Reconstruction(**settings)


@pytest.mark.parametrize(
    ("batches", "method", "message"),
    [
        (BATCHES[:1], Wanda(), "needs at least 2 calibration batches, one of them held out, got 1"),
        (None, Magnitude(), r"Reconstruction\(.*\) needs calibration batches, got None"),
        (None, Wanda(), r"Wanda\(.*\) needs calibration batches, got None"),
    ],
)
def test_too_few_batches_are_refused_before_anything_changes(batches, method, message, tmp_path):
    model, journal = tiny_llama(), Journal(tmp_path)
    with pytest.raises(ValueError, match=message):
        pruned(model, method, batches=batches, journal=journal)
    assert differing(model, tiny_llama()) == []
    assert not (tmp_path / "run.json").exists()  # so that the next run is not taken for another one


def test_infinite_activations_are_refused():
    model, batches = tiny_llama(), [batch.masked_fill(batch == 7, 8) for batch in BATCHES]
    model.model.embed_tokens.weight.data[7] = float("nan")
    batches[-1][1, 0] = 7
    with pytest.raises(
        ValueError, match=r"hidden states behind model.layers.0 are NaN or infinite: the model overflows"
    ):
        pruned(model, Magnitude(), batches=batches)


def test_a_layer_without_pruned_linears_is_not_trained():
    model, report = pruned(tiny_llama(), ignore=["layers.1.*"])
    assert [*report.reconstruction] == ["model.layers.0", "model.layers.2"]
    assert differing(model.model.layers[1], tiny_llama().model.layers[1]) == []


def test_layers_that_share_a_matrix_are_refused():
    model = tiny_llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        ValueError, match=r"layers\.2\.mlp\.up_proj and .*0\.mlp\.up_proj share .* leave reconstruction"
    ):
        pruned(model)


@pytest.mark.parametrize(
    ("batches", "share", "train", "held_out"),
    [
        (2, 0.125, [0], [1]),
        (4, 0.125, [0, 1, 2], [3]),
        (17, 0.125, [*range(7), *range(8, 15), 16], [7, 15]),
        (5, 0.5, [0, 2, 4], [1, 3]),
    ],
)
def test_every_so_many_batches_one_is_held_out(batches, share, train, held_out):
    assert Reconstruction(held_out=share).split(batches) == (train, held_out)


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral, lambda: tiny_llama().bfloat16()])
def test_where_memory_is_short_parts_are_computed_twice(build, monkeypatch, caplog):
    def counted(calls):
        model = build()
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
        return pruned(model)

    once, twice = [], []
    plain, wanted = counted(once)
    monkeypatch.setattr(reconstruction, "free_memory", lambda device: 1000)
    with caplog.at_level("INFO"):
        model, report = counted(twice)
    assert len(twice) > len(once)
    assert sum("parts are computed twice" in line for line in caplog.messages) == len(report.reconstruction)
    assert differing(model, plain) == []
    assert [layer.after for layer in report.reconstruction.values()] == [
        layer.after for layer in wanted.reconstruction.values()
    ]
    assert not any("forward" in vars(module) for module in model.modules())
