"""Models that go through their layers several times: each is pruned at its last call, with what enters it in all."""

import copy

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral, token_batches
from torch import nn
from transformers import AlbertConfig, AlbertModel

from wanda_lightning import OWL, InputHessian, Journal, Reconstruction, SemiStructured, SparseGPT, Wanda, prune_model
from wanda_lightning.calibration.call_order import CallOrder
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.experts import expert_inputs

BATCHES = token_batches(3)
IN_TURN = [0, 1, 2] * 3


class Repeated(nn.ModuleList):
    """Layers that a model goes through in an order of its own."""

    calls: list[int]

    def __getitem__(self, index):
        return (
            [self._modules[str(call)] for call in self.calls]
            if isinstance(index, slice)
            else super().__getitem__(index)
        )


def looped(calls, model=tiny_llama):
    model = model()
    model.model.layers = Repeated(model.model.layers)
    model.model.layers.calls = calls
    return model


class Unrolled(nn.ModuleList):
    def __getitem__(self, index):
        return [self._modules[str(call)] for call in range(len(self))]


@torch.no_grad()
def prune_linear_by_linear(model, calls, batches, method, pattern):
    """Run the whole model for every linear in turn, where calls before a layer's last see it dense."""
    last = {layer: max(at for at, call in enumerate(calls) if call == layer) for layer in calls}
    layers = [model.model.layers._modules[str(layer)] for layer in calls]
    unrolled = copy.deepcopy(model)
    unrolled.model.layers = Unrolled(
        layer if last[calls[at]] == at else copy.deepcopy(layer) for at, layer in enumerate(layers)
    )
    for layer in sorted(last, key=lambda layer: last[layer]):
        copies = [unrolled.model.layers._modules[str(at)] for at, call in enumerate(calls) if call == layer]
        for name in [name for name, module in copies[0].named_modules() if isinstance(module, nn.Linear)]:
            modules = [copied.get_submodule(name) for copied in copies]
            hessian = InputHessian(modules[0].in_features)
            for module in modules:  # call by call, as the sums are rounded
                hook = module.register_forward_pre_hook(lambda _, args, seen=hessian: seen.update(args[0]))
                for batch in batches:
                    unrolled(batch, use_cache=False)
                hook.remove()
            statistic = hessian if method.statistic is InputHessian else hessian.norm()
            method.prune(modules[-1].weight, statistic, pattern)


@pytest.mark.parametrize(
    ("calls", "method"),
    [(IN_TURN, SparseGPT(block_size=16)), ([0, 1, 1, 1, 2], Wanda()), ([0, 1, 2, 1, 0], SparseGPT(block_size=16))],
    ids=["in turn", "the middle one", "there and back"],
)
def test_equal_a_loop_over_the_unrolled_model(calls, method):
    ours, plain = looped(calls), looped(calls)
    report = prune_model(ours, BATCHES, method, SemiStructured(2, 4))
    prune_linear_by_linear(plain, calls, BATCHES, method, SemiStructured(2, 4))
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))
    assert {row.name: row.tokens for row in report.linears} == {
        linear.name: 96 * calls.count(number)
        for number, layer in enumerate(decoder_layers(ours))
        for linear in layer.linears
    }


@pytest.mark.parametrize("true_sequential", [True, False])
@torch.no_grad()
def test_experts_are_pruned_with_the_tokens_of_all_calls(true_sequential):
    model, calls = looped([0, 1] * 2, tiny_mixtral), []
    experts = model.model.layers[1].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    for batch in BATCHES:
        model(batch, use_cache=False)
    hook.remove()
    target = "model.layers.1.mlp.experts.gate_up_proj.2"
    (linear,) = [linear for linear in decoder_layers(model)[1].linears if linear.name == target]
    x_TI = torch.cat([x for args in calls for _, x in expert_inputs([linear], args, None)]).double()
    score_OI = linear.weight_OI.double().abs() * x_TI.norm(dim=0)
    pruned = score_OI.argsort(1)[:, :16]
    report = prune_model(model, BATCHES, "wanda", 0.5, targets=[target], true_sequential=true_sequential)
    assert [row.tokens for row in report.linears] == [len(x_TI)]
    assert torch.equal(linear.weight_OI == 0, torch.zeros_like(score_OI, dtype=torch.bool).scatter(1, pruned, True))


class Pair(nn.Module):
    """Two linears that see the same where nothing else is said."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, seen=None):
        return x + self.one(x) * self.other(x if seen is None else seen)


@pytest.mark.parametrize("true_sequential", [True, False])
@torch.no_grad()
def test_linears_that_share_their_input_in_the_last_call_only(true_sequential):
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Pair()])})
    pair, (x, other) = model["blocks"][0], torch.randn(2, 50, 16)
    score_OI = pair.other.weight.abs() * torch.cat([other, pair(x, other)]).norm(dim=0)
    prune_model(
        model, [x], "wanda", 0.5, forward=lambda m, x: pair(pair(x, other)), true_sequential=true_sequential
    )  # fmt: skip
    lowest = torch.zeros_like(score_OI, dtype=torch.bool).scatter(1, score_OI.argsort(1)[:, :8], True)
    assert torch.equal(pair.other.weight == 0, lowest)


class Messages(Pair):
    """A linear that only some calls reach."""

    def forward(self, x, seen=None):
        return x + self.one(x) if seen is None else x + self.one(x) * self.other(seen)


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("calls", [[0, 1], [1, 0], [0, 1, 0], [1, 0, 1]], ids=str)
@torch.no_grad()
def test_linears_that_only_some_calls_reach(calls, true_sequential):
    """As those for the messages of one pass to the next in Inkling 2 Loop, which the first pass has no use for."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Messages()])})
    pair, (x, seen) = model["blocks"][0], torch.randn(2, 50, 16)
    score_OI = pair.other.weight.abs() * seen.norm(dim=0)

    def forward(model, x):
        for call in calls:
            x = pair(x, seen if call else None)

    report = prune_model(model, [x], "wanda", 0.5, forward=forward, true_sequential=true_sequential)
    assert [row.tokens for row in report.linears] == [50 * len(calls), 50 * sum(calls)]
    lowest = torch.zeros_like(score_OI, dtype=torch.bool).scatter(1, score_OI.argsort(1)[:, :8], True)
    assert torch.equal(pair.other.weight == 0, lowest)


def test_linears_that_no_call_reaches_are_refused():
    model = nn.ModuleDict({"blocks": nn.ModuleList([Messages()])})
    error = error_of(model, [torch.randn(4, 16)], forward=lambda m, x: m["blocks"][0](m["blocks"][0](x)))
    assert "does not call blocks.0.other" in error


@torch.no_grad()
def test_albert_calls_one_layer_for_all():
    torch.manual_seed(0)
    size = {"vocab_size": 300, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    model = AlbertModel(AlbertConfig(**size, num_attention_heads=4, num_hidden_layers=4)).eval()
    query, inputs = model.encoder.albert_layer_groups[0].albert_layers[0].attention.query, []
    hook = query.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).double()))
    for batch in BATCHES:
        model(input_ids=batch)
    hook.remove()
    score_OI = query.weight.double().abs() * torch.cat(inputs).norm(dim=0)
    batches = [{"input_ids": batch} for batch in BATCHES]
    report = prune_model(model, batches, "wanda", 0.5, forward=lambda model, batch: model(**batch))
    assert {(row.sparsity, row.tokens) for row in report.linears} == {(0.5, 4 * 96)}
    lowest = torch.zeros_like(score_OI, dtype=torch.bool).scatter(1, score_OI.argsort(1)[:, :16], True)
    assert torch.equal(query.weight == 0, lowest)


def test_sparsity_is_split_by_what_enters_in_all_calls():
    """OWL looks at the inputs that Wanda does; a layer without outliers in its first call may have them later."""
    whole, last = ({row.name: row.sparsity for row in owl(calls).linears} for calls in (IN_TURN, [0, 1, 2]))
    assert whole != last


def owl(calls):
    return prune_model(looped(calls), BATCHES, "wanda", 0.5, allocation=OWL(factor=2.0))


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(tmp_path):
    """Layers that are finished are dense in the earlier calls of those that are not."""
    whole, cut, again = (looped(IN_TURN) for _ in range(3))
    prune_model(whole, BATCHES, "sparsegpt", 0.5)

    def first_alone(layers, _):
        yield next(iter(layers))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_model(cut, BATCHES, "sparsegpt", 0.5, journal=Journal(tmp_path), progress=first_alone)
    report = prune_model(again, BATCHES, "sparsegpt", 0.5, journal=Journal(tmp_path))
    assert all(map(torch.equal, again.parameters(), whole.parameters()))
    assert len(report.linears) == 21


@pytest.mark.parametrize("settings", [{"dense_target": True}, {"reconstruction": Reconstruction(epochs=1)}])
def test_what_needs_the_dense_layers_is_refused(settings):
    error = error_of(looped(IN_TURN), BATCHES, **settings)
    assert "does not call each of its layers once and in turn" in error


def test_a_second_list_that_is_called_several_times_is_refused_before_the_first_changes():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.ModuleList([Pair(), Pair()]) for name in ("early", "late")})

    def forward(model, x):
        for layer in [*model["early"], *model["late"], *model["late"]]:
            x = layer(x)

    batches = [torch.randn(2, 8, 16) for _ in range(3)]
    error = error_of(model, batches, forward=forward, dense_target=True)
    assert "does not call each of its layers once and in turn" in error


def test_batches_for_which_the_order_is_another_are_refused():
    model = looped(IN_TURN)
    model.model.register_forward_pre_hook(lambda model, args, kwargs: longer(model, kwargs), with_kwargs=True)
    error = error_of(model, [*BATCHES, torch.zeros(1, 20, dtype=torch.long)])
    assert "calls decoder layer 2 where layer 0 would be next" in error


def test_calls_that_are_missing_or_too_many_are_told():
    order = CallOrder([0, 1])
    order.called(0)
    with pytest.raises(ValueError, match="makes 1 of 2 calls of its decoder layers"):
        order.ended()
    order.called(1)
    order.ended()
    with pytest.raises(ValueError, match="calls decoder layer 0 where layer none would be next"):
        order.called(0)


def longer(model, kwargs):
    model.layers.calls = IN_TURN if kwargs["input_ids"].shape[1] < 20 else [0, 1, 2, 2]


def error_of(model, batches, **settings):
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError) as error:
        prune_model(model, batches, "wanda", 0.5, **settings)
    assert all(map(torch.equal, model.parameters(), before))
    return str(error.value)
