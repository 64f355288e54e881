"""Mixtures of experts: fused into 3-D parameters, as in transformers, or a list of modules, as in remote code."""

import logging

import pytest
import torch
from helpers import MIXTURE, mixtral, tiny_llama, token_batches
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import linear as apply_linear

from wanda_lightning.calibration.walk import walk
from wanda_lightning.callbacks import WandaPruning
from wanda_lightning.engine.measured_sparsity import sparsity_now
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Magnitude, SparseGPT, Wanda
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.experts import expert_inputs
from wanda_lightning.model.language_model import find_language_model
from wanda_lightning.model.linears import prunable_linears
from wanda_lightning.sparsity import SemiStructured, Unstructured
from wanda_lightning.statistics import InputHessian, InputNorm
from wanda_lightning.training.masks import WeightMasks


def gpt_oss():  # transposed weights, biases, gate and up interleaved, a gate of its own
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(**MIXTURE, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    ).eval()
    for layer in model.model.layers:
        for bias in (layer.mlp.experts.gate_up_proj_bias, layer.mlp.experts.down_proj_bias):
            nn.init.normal_(bias, std=0.3)
    return model


def nemotron():  # experts without a gate
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    return NemotronHForCausalLM(
        NemotronHConfig(
            **MIXTURE | {"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "moe_intermediate_size": 16}
        )
    ).eval()


def llama4():  # every expert multiplies all tokens, times the router's score, which is zero for most
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    settings = MIXTURE | {"num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 8}
    model = Llama4ForCausalLM(Llama4TextConfig(**settings)).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.feed_forward.experts.gate_up_proj)
    return model


def experts_of(layer):
    return {linear.module: name for linear in layer.linears if (name := linear.experts)}


def in_plain_forward(model, module, batch):
    """What enters and leaves a module in the model's own forward."""
    calls = []
    hook = module.register_forward_hook(lambda _, args, out: calls.append((*args, out)))
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    hook.remove()
    return calls


@pytest.mark.parametrize("build", [mixtral, gpt_oss, nemotron])
@torch.no_grad()
def test_each_expert_sees_exactly_its_tokens(build):
    """The experts' outputs, put together from what enters their last matrices, are the module's own."""
    model = build()
    layer = decoder_layers(model)[-1]
    ((module, name),) = experts_of(layer).items()
    linears = [linear for linear in layer.linears if linear.module is module]
    assert len(linears) == 8
    assert linears[3].name in (f"{name}.gate_up_proj.3", f"{name}.up_proj.3")
    (batch,) = token_batches(1, vocab=64)
    ((hidden_TI, index_TK, weight_TK, expected_TO),) = in_plain_forward(model, module, batch)
    out_TO = torch.zeros_like(expected_TO)
    for linear, x_TI in expert_inputs(linears, [hidden_TI, index_TK], None):
        token_T, chosen_T = torch.where(index_TK == linear.expert)
        assert len(x_TI) == len(token_T)
        assert x_TI.shape[1] == linear.weight_OI.shape[1]
        if linear.parameter == "down_proj":
            bias = module.down_proj_bias[linear.expert] if hasattr(module, "down_proj_bias") else None
            out_TO[token_T] += weight_TK[token_T, chosen_T, None] * apply_linear(x_TI, linear.weight_OI, bias)
        else:
            assert torch.equal(x_TI, hidden_TI[token_T])
    torch.testing.assert_close(out_TO, expected_TO, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 6])
@torch.no_grad()
def test_experts_that_are_called_in_a_way_of_their_own_are_watched(padding):
    layer = decoder_layers(llama4())[-1]
    ((module, _),) = experts_of(layer).items()
    linears = [linear for linear in layer.linears if linear.module is module]
    torch.manual_seed(1)
    mask_BT = torch.arange(16)[None] >= padding
    chosen_T = torch.arange(16) % 3  # no token for the last of four experts
    x_ETI = torch.randn(4, 16, 32) * (torch.arange(4)[:, None, None] == chosen_T[:, None])
    seen = {
        (linear.parameter, linear.expert): x_TI
        for linear, x_TI in expert_inputs(linears, [x_ETI.reshape(64, 32)], None if not padding else mask_BT)
    }
    expected = {}
    for expert in range(4):
        x_TI = x_ETI[expert][(chosen_T == expert) & mask_BT[0]]
        gate_TO, up_TO = (x_TI @ module.gate_up_proj[expert]).chunk(2, dim=-1)
        expected |= {("gate_up_proj", expert): x_TI, ("down_proj", expert): up_TO * nn.functional.silu(gate_TO)}
    assert [len(expected["down_proj", e]) for e in range(4)] == ([6, 5, 5, 0] if not padding else [4, 3, 3, 0])
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_tokens_that_all_experts_see_wait_for_each(monkeypatch):
    """Two sequences of 16 tokens in float32; in the shared expert these wait: 32 numbers for each of four experts, that
    enter them and that they give; what the router says, twice; what entered the layer, what its attention gave, what is
    behind that, and that normed.
    """
    waiting = 2 * 16 * 4 * (2 * 4 * 32 + 2 * 4 + 4 * 32)
    orders = []
    for free in (waiting - 1, waiting):
        monkeypatch.setattr("wanda_lightning.engine.order.free_memory", lambda device, free=free: free)
        report = prune_model(llama4(), token_batches(1, vocab=64), Wanda(), Unstructured(0.5), activations="disk")
        orders.append(report.order)
    assert orders == ["two passes", "one pass"]


class LoopedExperts(nn.Module):
    """As LongCat-Flash has them: called as those of transformers, but without saying how they are laid out."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 32) / 4)
        self.down_proj = nn.Parameter(torch.randn(4, 32, 16) / 4)

    def forward(self, hidden_TI, index_TK, weight_TK):
        out_TI = torch.zeros_like(hidden_TI, dtype=self.gate_up_proj.dtype)
        for expert in index_TK.unique():
            token_T, chosen_T = torch.where(index_TK == expert)
            gate_TO, up_TO = apply_linear(hidden_TI[token_T], weight=self.gate_up_proj[expert]).chunk(2, dim=-1)
            routed_TI = self.last(gate_TO.sigmoid() * up_TO, expert)
            out_TI.index_add_(0, token_T, routed_TI * weight_TK[token_T, chosen_T, None])
        return out_TI

    def last(self, x_TI, expert):
        return x_TI @ self.down_proj[expert].T


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 4, bias=False), LoopedExperts()

    def forward(self, hidden):
        x_TI = hidden.reshape(-1, 32)
        weight_TK, index_TK = self.gate(x_TI).softmax(-1).topk(2)
        return self.experts(x_TI, index_TK, weight_TK).view(hidden.shape)


def looped_llama():
    torch.manual_seed(0)
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = Looped()
    return model


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_experts_are_pruned_with_what_enters_them(batches, padded):
    """Against experts of the same weights that are listed, one linear after the other, by a loop over the model."""
    model, plain = looped_llama(), looped_llama()
    batch = batches[0] if not padded else {"input_ids": batches[0], "attention_mask": torch.ones_like(batches[0])}
    if padded:
        batch["attention_mask"][1, :5] = 0
    report = prune_model(model, [batch], SparseGPT(block_size=16), SemiStructured(2, 4), targets=["*.mlp.experts.*"])
    assert {row.passes for row in report.linears} == {1}
    for layer in plain.model.layers:
        for parameter in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            ((hidden_TI, index_TK, _, _),) = in_plain_forward(plain, layer.mlp.experts, batch)
            for expert in range(4):
                routed_T = (index_TK == expert).any(-1)
                if padded:
                    routed_T &= batch["attention_mask"].flatten().bool()
                x_TI = hidden_TI[routed_T]
                if parameter is layer.mlp.experts.down_proj:
                    gate_TO, up_TO = apply_linear(x_TI, layer.mlp.experts.gate_up_proj[expert]).chunk(2, dim=-1)
                    x_TI = gate_TO.sigmoid() * up_TO
                statistic = InputHessian(x_TI.shape[1])
                statistic.update(x_TI)
                SparseGPT(block_size=16).prune(parameter[expert], statistic, SemiStructured(2, 4))
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert not all(map(torch.equal, model.parameters(), looped_llama().parameters()))


class BroadcastExperts(nn.Module):
    """All see all tokens, in one product with them all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(4, 8, 10)), nn.Parameter(torch.randn(4, 5, 8))

    def forward(self, x):
        gate, up = (x @ self.gate_up_proj).chunk(2, dim=-1)
        return (gate.sigmoid() * up) @ self.down_proj


@pytest.mark.parametrize("shape", [(6, 8), (1, 6, 8), (4, 6, 8), (2, 1, 3, 8)])
@torch.no_grad()
def test_tokens_that_are_multiplied_with_all_experts_at_once_enter_each(shape):
    torch.manual_seed(0)
    module, x_TI = BroadcastExperts(), torch.randn(6, 8)
    called = x_TI.expand(shape) if shape[-2] == 6 else x_TI.view(shape)
    seen = {linear.name: x for linear, x in expert_inputs(prunable_linears(module, "mlp"), [called], None)}
    expected = {}
    for expert in range(4):
        gate_TI, up_TI = (x_TI @ module.gate_up_proj[expert]).chunk(2, dim=-1)
        expected[f"mlp.gate_up_proj.{expert}"], expected[f"mlp.down_proj.{expert}"] = x_TI, gate_TI.sigmoid() * up_TI
    torch.testing.assert_close(seen, expected)


def test_experts_whose_rows_are_sorted_cannot_tell_padding():
    """Sixteen tokens with two experts each, by expert: which row is of which token nothing tells."""
    layer = decoder_layers(llama4())[-1]
    ((module, _),) = experts_of(layer).items()
    linears = [linear for linear in layer.linears if linear.module is module]
    with pytest.raises(
        ValueError, match=r"experts is called with 32 rows for 16 tokens, and which of them are padding"
    ):
        list(expert_inputs(linears, [torch.randn(32, 32), [8, 8, 8, 8]], torch.arange(16)[None] > 3))


def test_experts_that_no_token_enters_are_not_refused():
    linears = prunable_linears(LoopedExperts(), "mlp")
    nothing = [torch.empty(0, 32), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2)]
    assert not list(expert_inputs(linears, nothing, None))


@pytest.mark.parametrize("take", [torch.mm, torch.Tensor.mm, torch.Tensor.matmul])
@torch.no_grad()
def test_a_product_may_be_taken_in_several_ways(monkeypatch, take):
    torch.manual_seed(0)
    module, called = LoopedExperts(), [torch.randn(6, 32), torch.arange(12).view(6, 2) % 4, torch.rand(6, 2)]
    linears = prunable_linears(module, "mlp")
    expected = {linear.name: x for linear, x in expert_inputs(linears, called, None)}
    monkeypatch.setitem(globals(), "apply_linear", lambda x, weight: take(x, weight.T))
    monkeypatch.setattr(LoopedExperts, "last", lambda self, x_TI, expert: take(x_TI, self.down_proj[expert].T))
    torch.testing.assert_close({linear.name: x for linear, x in expert_inputs(linears, called, None)}, expected)


def product_by_einsum(x_TI, weight):
    return torch.einsum("ti,oi->to", x_TI, weight)


@pytest.mark.parametrize(("parameter", "other"), [("down_proj", apply_linear), ("gate_up_proj", product_by_einsum)])
def test_experts_that_cannot_be_watched_are_refused(batches, monkeypatch, parameter, other):
    monkeypatch.setitem(globals(), "apply_linear", other)
    monkeypatch.setattr(
        LoopedExperts, "last", lambda self, x_TI, expert: product_by_einsum(x_TI, self.down_proj[expert])
    )
    model = looped_llama()
    message = rf"what enters model\.layers\.0\.mlp\.experts\.{parameter} cannot be told: Looped"
    with pytest.raises(ValueError, match=message):
        prune_model(model, batches, Wanda(), Unstructured(0.5))
    assert all(map(torch.equal, model.parameters(), looped_llama().parameters()))


@pytest.mark.parametrize("statistic", [InputNorm, InputHessian])
@torch.no_grad()
def test_statistics_count_routed_tokens_and_no_padding(statistic):
    model = mixtral()
    (ids_BT,) = token_batches(1, vocab=64)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :6] = 0
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT}
    layers = decoder_layers(model)
    for step in walk(model, layers, [batch, batch]):
        statistics = step.collect(statistic)
    (module,) = experts_of(layers[-1])
    ((hidden_TI, index_TK, *_),) = in_plain_forward(model, module, batch)
    for expert in range(4):
        chosen_T = (index_TK == expert).any(1) & mask_BT.flatten().bool()
        expected = statistic(32)
        expected.update(hidden_TI[chosen_T])
        expected.merge(expected)
        gathered = statistics[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"]
        assert gathered.tokens == expected.tokens > 0
        torch.testing.assert_close(gathered.compute(), expected.compute(), rtol=1e-4, atol=1e-4)
        assert statistics[f"model.layers.1.mlp.experts.down_proj.{expert}"].tokens == gathered.tokens
    assert sum(statistics[f"model.layers.1.mlp.experts.down_proj.{e}"].tokens for e in range(4)) == 2 * 2 * (16 + 10)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(0.4), SemiStructured(2, 4)], ids=str)
def test_experts_without_tokens_fall_back_to_magnitude(method, pattern, caplog):
    model = mixtral(num_local_experts=16)
    before = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    with caplog.at_level(logging.WARNING):
        report = prune_model(model, token_batches(1, batch_size=1, length=3, vocab=64), method, pattern)
    unseen = [row for row in report.linears if row.tokens == 0]
    assert 20 <= len(unseen) < 64
    (record,) = caplog.records
    assert f"no calibration token reached {len(unseen)} of 64 expert matrices" in record.getMessage()
    for row in report.linears:
        per_row = int(pattern.sparsity * row.shape[1]) / row.shape[1]
        assert row.sparsity == pytest.approx(per_row if row.tokens == 0 else pattern.sparsity, abs=1 / row.shape[1])
        assert (row.error is None) == (row.tokens == 0)
    for expert in [int(row.name.rpartition(".")[2]) for row in unseen if "layers.0.mlp.experts.gate_up" in row.name]:
        dense_OI, pruned_OI = before[expert], model.model.layers[0].mlp.experts.gate_up_proj[expert]
        assert torch.equal(pruned_OI, dense_OI * pattern.mask(dense_OI.abs()))


def test_magnitude_does_not_depend_on_tokens(caplog):
    plain, with_errors = mixtral(num_local_experts=16), mixtral(num_local_experts=16)
    batches = token_batches(1, batch_size=1, length=3, vocab=64)
    prune_model(plain, None, Magnitude(), Unstructured(0.5))
    prune_model(with_errors, batches, Magnitude(), Unstructured(0.5), exact_error=True)
    assert all(map(torch.equal, plain.parameters(), with_errors.parameters()))
    assert not caplog.records


def test_processes_with_different_experts_hold_the_same_statistics():
    """Sums over processes go by position: which experts a process has seen must not change the order."""
    model = mixtral(num_local_experts=16)
    names = []
    for seed in (1, 2):
        batches = token_batches(1, batch_size=1, length=3, vocab=64, seed=seed)
        with torch.no_grad():
            names.append(list(next(iter(walk(model, decoder_layers(model), batches))).collect(InputNorm)))
    assert names[0] == names[1] == [linear.name for linear in decoder_layers(model)[0].linears]


def test_the_model_is_left_as_found():
    model = mixtral()
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or infinite"):
        prune_model(model, token_batches(vocab=64), Wanda(), Unstructured(0.5))
    assert model.get_experts_implementation() == {"": "batched_mm"}
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


def test_a_single_expert_can_be_a_target():
    model = mixtral()
    before = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    report = prune_model(model, token_batches(vocab=64), Wanda(), Unstructured(0.5), targets=["layers.1.*.down_proj.2"])
    assert [row.name for row in report.linears] == ["model.layers.1.mlp.experts.down_proj.2"]
    after = model.model.layers[1].mlp.experts.down_proj
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True, True, False, True]


def test_routers_are_left_alone_and_named():
    report = prune_model(mixtral(), token_batches(vocab=64), Wanda(), Unstructured(0.5))
    assert report.not_pruned == {f"model.layers.{i}.mlp.gate.weight": "router" for i in range(2)}


def test_the_zeros_of_experts_are_kept_by_one_mask():
    model = mixtral()
    prune_model(model, token_batches(vocab=64), Wanda(), SemiStructured(2, 4))
    linears = [linear for layer in decoder_layers(model) for linear in layer.linears]
    masks = WeightMasks({linear.parameter_name: linear.weight for linear in linears})
    assert len(masks.masks) == 2 * (4 + 2)
    assert all(model.get_parameter(name) is weight for name, weight, _ in masks.masks)


class Tuned(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_fine_tuning_keeps_the_zeros_of_experts(tmp_path):
    module = Tuned(mixtral())
    pruning = WandaPruning(sparsity=0.5)
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[pruning],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.cat(token_batches(vocab=64)), batch_size=2))
    experts = module.model.model.layers[0].mlp.experts
    assert (experts.gate_up_proj == 0).float().mean() == (experts.down_proj == 0).float().mean() == 0.5
    assert sparsity_now(find_language_model(module), [(pruning.report, None)]) == 0.5


class ListedExperts(nn.Module):
    """As remote code has it: a linear router, and a module for each expert that is called with its tokens, if any."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(32, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(32, 16, bias=False), "w3": nn.Linear(32, 16), "w2": nn.Linear(16, 32)})
            for _ in range(experts)
        )

    def forward(self, hidden):
        x_TI = hidden.reshape(-1, 32)
        chosen_T = self.gate(x_TI).argmax(-1)
        out_TI = torch.zeros_like(x_TI)
        for number, expert in enumerate(self.experts):
            if (chosen_T == number).any():
                routed = x_TI[chosen_T == number]
                out_TI[chosen_T == number] = expert["w2"](expert["w1"](routed).relu() * expert["w3"](routed))
        return out_TI.view(hidden.shape)


def listed_llama(experts: int = 4):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = ListedExperts(experts)
    return model


@torch.no_grad()
def test_listed_experts_have_statistics_of_their_tokens(batches):
    model = listed_llama()
    first = next(iter(walk(model, decoder_layers(model), batches)))
    statistics = first.collect(InputNorm)
    module = model.model.layers[0].mlp
    calls = [call for batch in batches for call in in_plain_forward(model, module, batch)]
    x_TI = torch.cat([hidden.reshape(-1, 32) for hidden, _ in calls])
    chosen_T = module.gate(x_TI).argmax(-1)
    for expert in range(4):
        norm = statistics[f"model.layers.0.mlp.experts.{expert}.w1"]
        assert norm.tokens == (chosen_T == expert).sum()
        torch.testing.assert_close(norm.compute(), x_TI[chosen_T == expert].norm(dim=0), rtol=1e-4, atol=1e-5)


def test_listed_experts_without_tokens_fall_back_to_magnitude(caplog):
    model = listed_llama(experts=16)
    report = prune_model(model, token_batches(1, batch_size=1, length=4), SparseGPT(), SemiStructured(2, 4))
    unseen = [row for row in report.linears if row.tokens == 0]
    assert len(unseen) >= 3 * 3 * 12
    assert {row.sparsity for row in report.linears} == {0.5}
    assert f"{len(unseen)} of {3 * 3 * 16} expert matrices" in caplog.text
    assert set(report.not_pruned.values()) == {"router"}


def test_listed_experts_cannot_tell_padding(batches):
    mask_BT = torch.ones_like(batches[0])
    mask_BT[1, :5] = 0
    with pytest.raises(
        ValueError, match=r"experts\.\d\.w1 has \d+ inputs for 32 tokens, and which of them are padding"
    ):
        prune_model(listed_llama(), [{"input_ids": batches[0], "attention_mask": mask_BT}], Wanda(), Unstructured(0.5))


def test_experts_that_are_never_called_are_an_error(batches):
    model = listed_llama()
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(ValueError, match=r"no calibration token reached model\.layers\.1\.mlp\.experts\.0\.w1.*ignore"):
        prune_model(model, batches, Wanda(), Unstructured(0.5))
