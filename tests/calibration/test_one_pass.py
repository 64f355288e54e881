"""One visit to a layer gives what a loop gives that runs the whole model for every linear in turn."""

import copy

import pytest
import torch
from helpers import Forked, mixtral, tiny_llama, tiny_mixtral, token_batches
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from wanda_lightning import Ablate, InputHessian, SemiStructured, SparseGPT, Unstructured, Wanda, prune_model
from wanda_lightning.calibration.hidden_states import HiddenStates
from wanda_lightning.methods import Magnitude
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.experts import expert_inputs

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
FAMILIES = {
    "llama": lambda: tiny_llama(layers=2, vocab_size=64),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "Gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=4)),
    "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **EXPERTS)),
    "Mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)),
    "Falcon": lambda: FalconForCausalLM(
        FalconConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
        )
    ),
}
BATCHES = token_batches(3, batch_size=2, length=12, vocab=64) + token_batches(1, batch_size=1, length=7, vocab=64)


def built(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


@torch.no_grad()
def prune_linear_by_linear(model, batches, method, pattern):
    """For every linear in the order of calls: run the whole model, hook this linear, prune it."""
    for layer in decoder_layers(model):
        for linear in in_the_order_of_calls(model, layer.linears, batches[0]):
            statistic = method.statistic(linear.weight_OI.shape[1])

            def see(module, args, linear=linear, statistic=statistic):
                if linear.expert is None:
                    statistic.update(args[0])
                else:
                    for _, x_TI in expert_inputs([linear], args, None):
                        statistic.update(x_TI)

            hook = linear.module.register_forward_pre_hook(see)
            for batch in batches:
                model(**(batch if isinstance(batch, dict) else {"input_ids": batch}), use_cache=False)
            hook.remove()
            weight_OI = linear.weight_OI.clone()
            method.prune(weight_OI, statistic, pattern)
            linear.weight_OI.copy_(weight_OI)


def in_the_order_of_calls(model, linears, batch):
    calls = []
    hooks = [x.module.register_forward_pre_hook(lambda *_, x=x: calls.append(x)) for x in linears]
    model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sorted(calls, key=lambda x: (calls.index(x), x.parameter == "down_proj"))


def differing(one, other):
    return [n for (n, a), b in zip(one.named_parameters(), other.parameters(), strict=True) if not torch.equal(a, b)]


@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("method", [Wanda(), SparseGPT(block_size=16)], ids=["Wanda", "SparseGPT"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_run_of_the_whole_model_for_every_linear(family, method, pattern):
    ours, plain = built(family), built(family)
    report = prune_model(ours, BATCHES, method, pattern, true_sequential=True)
    prune_linear_by_linear(plain, BATCHES, method, pattern)
    assert differing(ours, plain) == []
    assert {row.passes for row in report.linears} == {1}
    assert differing(ours, built(family))


@pytest.mark.parametrize("method", [Wanda(variant=True), Ablate(block_size=16), Magnitude()], ids=str)
def test_every_method(method):
    ours, plain = built("llama"), built("llama")
    exact = method.statistic is None
    report = prune_model(ours, BATCHES, method, Unstructured(0.5), true_sequential=True, exact_error=exact)
    if exact:
        prune_model(plain, None, method, Unstructured(0.5))
        assert all(row.error_is_exact and row.passes == 1 for row in report.linears)
    else:
        prune_linear_by_linear(plain, BATCHES, method, Unstructured(0.5))
    assert differing(ours, plain) == []


class Doubled(TorchFunctionMode):
    """A model's own mode, in which every ReLU gives twice as much."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is torch.relu else out


class InMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden):
        with Doubled():
            return torch.relu(self.down_proj(torch.relu(self.up_proj(hidden))))


def test_a_model_that_enters_a_mode_of_its_own_around_a_linear():
    ours = built("llama")
    ours.model.layers[0].mlp = InMode()
    plain = copy.deepcopy(ours)
    report = prune_model(ours, BATCHES, Wanda(), Unstructured(0.5), true_sequential=True)
    prune_linear_by_linear(plain, BATCHES, Wanda(), Unstructured(0.5))
    assert ({row.passes for row in report.linears}, differing(ours, plain)) == ({1}, [])


def test_each_layer_runs_once(llama, batches):
    calls = []
    for number, layer in enumerate(llama.model.layers):
        layer.mlp.gate_proj.register_forward_hook(lambda *_, number=number: calls.append(number))
    prune_model(llama, batches, Wanda(), Unstructured(0.5), true_sequential=True)
    # Before that a few tokens go: through the first to see what it gives, through all for overflows, and twice to see
    # that each gives by itself what it gives in the model; and a batch through the first to see what waits in it.
    assert [calls.count(number) for number in range(3)] == [len(batches) + 5, len(batches) + 3, len(batches) + 3]


def test_padding_does_not_count():
    padded, plain = tiny_llama(), tiny_llama()
    ids = token_batches(1, batch_size=4, length=12)[0]
    mask = torch.ones_like(ids)
    mask[2:, 8:] = 0
    batches = [{"input_ids": ids.masked_fill(mask == 0, 3), "attention_mask": mask}]
    report = prune_model(padded, batches, Wanda(), Unstructured(0.5), true_sequential=True)
    prune_model(plain, [ids[:2], ids[2:, :8]], Wanda(), Unstructured(0.5), true_sequential=True)
    assert {row.tokens for row in report.linears} == {2 * 12 + 2 * 8}
    differ = sum((a != b).sum().item() for a, b in zip(padded.parameters(), plain.parameters(), strict=True))
    assert differ <= 4  # attention sums in another order


def test_experts_behind_the_first_matrix_see_it_pruned():
    """down_proj's statistic comes from the pruned gate_up_proj: as if the experts were pruned in two runs."""
    ours, plain = tiny_mixtral(), tiny_mixtral()
    batches = token_batches()
    targets = ["*experts.gate_up_proj.*", "*experts.down_proj.*"]
    prune_model(ours, batches, Wanda(), Unstructured(0.5), targets=["layers.0.*experts*"], true_sequential=True)
    for target in targets:
        prune_model(plain, batches, Wanda(), Unstructured(0.5), targets=[f"model.layers.0.{target}"])
    assert differing(ours, plain) == []


class Named(nn.Module):
    """May pass by name what enters its linears."""

    def __init__(self, by_name):
        super().__init__()
        torch.manual_seed(1)
        self.up_proj, self.down_proj, self.by_name = nn.Linear(32, 32), nn.Linear(32, 32), by_name

    def forward(self, hidden):
        if self.by_name:
            return self.down_proj(input=self.up_proj(input=hidden))
        return self.down_proj(self.up_proj(hidden))


def test_inputs_of_linears_may_be_passed_by_name():
    models = []
    for by_name in (True, False):
        models.append(built("llama"))
        models[-1].model.layers[0].mlp = Named(by_name).eval()
        report = prune_model(models[-1], BATCHES, Wanda(), Unstructured(0.5))
        assert {row.passes for row in report.linears} == {1}
    assert differing(*models) == []


class Chunked(nn.Module):
    """Calls its first linear once for every 16 tokens."""

    def __init__(self):
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden):
        return torch.cat([self.down_proj(chunk) for chunk in self.up_proj(hidden).split(8, dim=1)], dim=1)


class Unshared(nn.Module):
    """Feeds two linears with one tensor, but in some batches with a copy of it."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden):
        return self.up_proj(hidden) + self.down_proj(hidden if hidden.shape[1] > 8 else hidden.clone())


class Sometimes(nn.Module):
    """Leaves its second linear out in some batches."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden):
        hidden = self.up_proj(hidden)
        return self.down_proj(hidden) if hidden.shape[1] > 8 else hidden


@pytest.mark.parametrize("mlp", [Chunked, Forked, Unshared, Sometimes])
@pytest.mark.parametrize("method", [Wanda(), SparseGPT(block_size=16)], ids=["Wanda", "SparseGPT"])
def test_what_cannot_stop_at_one_point_is_visited_twice(mlp, method):
    torch.manual_seed(3)
    model = tiny_llama(vocab_size=64)
    model.model.layers[1].mlp = mlp()
    twice, before = copy.deepcopy(model), copy.deepcopy(model)
    batches = token_batches(2, length=16, vocab=64) + token_batches(2, length=6, vocab=64)
    report = prune_model(model, batches, method, Unstructured(0.5), targets=["layers.1.*"], true_sequential=True)
    assert {row.passes for row in report.linears} == {2}
    prune_model(twice, batches, method, Unstructured(0.5), targets=["layers.1.*"])
    assert differing(model, twice) == []
    assert differing(model, before)
    everywhere = prune_model(before, batches, method, Unstructured(0.5), true_sequential=True)
    assert {row.layer: row.passes for row in everywhere.linears} == {
        "model.layers.0": 1,
        "model.layers.1": 2,
        "model.layers.2": 1,
    }


def test_what_is_used_without_a_call_is_seen_by_the_first_batch():
    """Else all wait, and linears are solved in vain, until at the end of the layer ``dt_proj`` was not called."""

    def calls_of_the_last(true_sequential):
        config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8, time_step_rank=16)
        model, calls = MambaForCausalLM(config).eval(), []
        model.backbone.layers[0].mixer.out_proj.register_forward_hook(lambda *_: calls.append(1))
        prune_model(model, BATCHES, Wanda(), Unstructured(0.5), true_sequential=true_sequential)
        return len(calls)

    assert calls_of_the_last(True) == calls_of_the_last(False) + 1  # one more shows what would wait


def test_a_list_of_experts_is_visited_twice(batches):
    model = tiny_llama()
    model.model.layers[1].mlp = Routed()
    report = prune_model(model, batches, Wanda(), Unstructured(0.5), true_sequential=True)
    assert {row.layer: row.passes for row in report.linears}["model.layers.1"] == 2


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])

    def forward(self, hidden):
        flat = hidden.reshape(-1, 32)
        first = flat[:, :1] > 0
        return torch.where(first, self.experts[0](flat), self.experts[1](flat)).view_as(hidden)


class FailsError(Exception):
    pass


@pytest.mark.parametrize("linear", ["o_proj", "down_proj"])
def test_a_forward_that_raises_leaves_the_layer_as_it_was(llama, batches, linear):
    before = copy.deepcopy(llama)
    module = llama.model.layers[1].self_attn.o_proj if linear == "o_proj" else llama.model.layers[1].mlp.down_proj
    calls = []

    def fails(*_):
        calls.append(1)
        if len(calls) > 4 + 2:  # the few tokens before (see test_each_layer_runs_once), and two batches
            raise FailsError

    hook = module.register_forward_hook(fails)
    with pytest.raises(FailsError):
        prune_model(llama, batches, SparseGPT(block_size=16), Unstructured(0.5), true_sequential=True)
    hook.remove()
    assert differing(llama.model.layers[0], before.model.layers[0])
    assert differing(llama.model.layers[1], before.model.layers[1]) == []
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_a_hopeless_hessian_leaves_the_layer_as_it_was(llama, batches, monkeypatch):
    before = copy.deepcopy(llama)
    factor = InputHessian.factor

    def hopeless(self, *settings):
        if self.in_features == 64:
            raise torch.linalg.LinAlgError("hopeless")
        return factor(self, *settings)

    monkeypatch.setattr(InputHessian, "factor", hopeless)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj cannot be pruned: hopeless"):
        prune_model(llama, batches, SparseGPT(block_size=16), Unstructured(0.5), true_sequential=True)
    assert differing(llama, before) == []


def test_hessians_are_freed_on_the_way(llama, batches):
    alive, most = [0], [0]

    class Counted(InputHessian):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    class Counting(SparseGPT):
        statistic = Counted

    prune_model(llama, batches, Counting(block_size=16), Unstructured(0.5), true_sequential=True)
    # Of four in a layer: that of q, k and v lives as long as attention holds its input, and when the first batch
    # reaches gate_proj, the others still wait within o_proj.
    assert most == [3]
    assert alive == [0]


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("model", [tiny_llama, mixtral], ids=["llama", "mixtral"])
def test_where_activations_wait_does_not_matter(place, model):
    here, elsewhere = model(), model()
    batches = token_batches(vocab=64)
    prune_model(here, batches, Wanda(), Unstructured(0.5), true_sequential=True)
    prune_model(elsewhere, batches, Wanda(), Unstructured(0.5), true_sequential=True, activations=place)
    assert differing(here, elsewhere) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_what_waits_leaves_the_gpu_and_comes_back(place):
    here, elsewhere = tiny_llama().cuda(), tiny_llama().cuda()
    prune_model(here, token_batches(), Wanda(), Unstructured(0.5), true_sequential=True)
    prune_model(elsewhere, token_batches(), Wanda(), Unstructured(0.5), true_sequential=True, activations=place)
    assert differing(here, elsewhere) == []


def test_what_waits_is_moved_to_disk(llama, batches, monkeypatch):
    """The storage of the tensors that wait is empty, and what was in it comes back."""
    seen = []
    set_aside = HiddenStates.set_aside

    def watched(self, tensor, name):
        before, fill = tensor.clone(), set_aside(self, tensor, name)
        seen.append(tensor.untyped_storage().nbytes())

        def fill_and_look():
            fill()
            assert torch.equal(tensor, before)

        return fill_and_look

    monkeypatch.setattr(HiddenStates, "set_aside", watched)
    prune_model(llama, batches, Wanda(), Unstructured(0.5), true_sequential=True, activations="disk")
    assert len(seen) == 3 * 4 * len(batches)
    assert set(seen) == {0}


def test_a_set_that_cannot_wait_is_refused_or_passed_twice(llama, batches, monkeypatch, caplog):
    before, twice, asked = (copy.deepcopy(llama) for _ in range(3))
    waiting = 4 * 2 * 16 * 4 * (64 + 2 * 32)  # four batches of 2 x 16 tokens in float32, before down_proj
    monkeypatch.setattr("wanda_lightning.engine.order.free_memory", lambda device: waiting - 1)
    with pytest.raises(ValueError, match=r"one pass holds .* 64 KiB .*model\.layers\.0.*true_sequential=False"):
        prune_model(llama, batches, Wanda(), Unstructured(0.5), true_sequential=True)
    assert differing(llama, before) == []
    assert prune_model(twice, batches, Wanda(), Unstructured(0.5)).order == "two passes"
    assert "every layer is passed twice: one pass holds" in caplog.text
    prune_model(asked, batches, Wanda(), Unstructured(0.5), true_sequential=False)
    assert differing(twice, asked) == []
    monkeypatch.setattr("wanda_lightning.engine.order.free_memory", lambda device: waiting)
    prune_model(llama, batches, Wanda(), Unstructured(0.5), true_sequential=True, activations="disk")
    prune_model(before, batches, Wanda(), Unstructured(0.5), true_sequential=True)
    assert differing(llama, before) == []


@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        # What entered the attention, queries, keys, values, and what enters its last linear.
        ({"num_key_value_heads": 4}, 32 + 3 * 32 + 32),
        # And for each of 4 heads the weights of 16 tokens, which are there up to down_proj.
        ({"attn_implementation": "eager"}, 64 + 4 * 16 + 2 * 32),
    ],
)
def test_what_waits_in_an_attention_is_counted(settings, numbers, place, monkeypatch):
    """On disk is what enters a linear; but the hidden states, which were there, are read and wait, too."""
    orders = []
    for free in (4 * 2 * 16 * 4 * numbers - 1, 4 * 2 * 16 * 4 * numbers):
        monkeypatch.setattr("wanda_lightning.engine.order.free_memory", lambda device, free=free: free)
        report = prune_model(tiny_llama(**settings), token_batches(), Wanda(), Unstructured(0.5), activations=place)
        orders.append(report.order)
    assert orders == ["two passes", "one pass"]


@pytest.mark.parametrize("model", [tiny_llama, mixtral], ids=["llama", "mixtral"])
def test_autocast_computes_with_the_pruned_weights(model):
    """It keeps copies of the weights in half precision; without these the result is the same."""
    kept, not_kept, exact = model(), model(), model()
    batches = token_batches(vocab=64)
    for pruned, settings in ((kept, {}), (not_kept, {"cache_enabled": False}), (exact, {"enabled": False})):
        with torch.autocast("cpu", torch.bfloat16, **settings):
            prune_model(pruned, batches, Wanda(), Unstructured(0.5), true_sequential=True)
    assert differing(kept, not_kept) == []
    assert differing(kept, exact)


def test_compiled_layers_are_run_as_they_were_written(llama, batches):
    plain, ran = copy.deepcopy(llama), []
    llama.model.layers = nn.ModuleList(torch.compile(layer, backend=ran.append) for layer in llama.model.layers)
    for model in (llama, plain):
        report = prune_model(model, batches, SparseGPT(block_size=16), Unstructured(0.5), true_sequential=True)
    assert differing(llama, plain) == []
    assert {row.passes for row in report.linears} == {1}
    assert not ran  # nothing was compiled
