"""Linears that a layer calls more than once, with other inputs each time, or for other tokens."""

import pytest
import torch
from helpers import tiny_llama, token_batches
from torch import nn
from transformers import LongformerConfig, LongformerForSequenceClassification

from wanda_lightning import prune_model
from wanda_lightning.model.decoder import decoder_layers

BATCHES = token_batches(3)


class Twice(nn.Module):
    """Two linears see the same input, and the second one its own output besides."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.gate_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        up, gate = self.up_proj(x), self.gate_proj(x)
        return up + self.gate_proj(3 * torch.tanh(gate))


class Again(nn.Module):
    """Calls its only linear twice, and nothing behind it."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(32, 32)

    def forward(self, x):
        return self.up_proj(3 * torch.tanh(self.up_proj(x)))


def lowest_of_the_whole_model(model, name, batches):
    """What Wanda removes of a linear, by all that enters it in the model as it is."""
    linear, inputs = model.get_submodule(name), []
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double().flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    hook.remove()
    score = linear.weight.detach().double().abs() * torch.cat(inputs).norm(dim=0)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.argsort(1)[:, : score.shape[1] // 2], value=True)


@pytest.mark.parametrize("true_sequential", [None, False])
@pytest.mark.parametrize(
    ("mlp", "targets"), [(Twice, ["gate_proj"]), (Twice, ["up_proj", "gate_proj"]), (Again, ["up_proj"])]
)
def test_all_calls_count(mlp, targets, true_sequential):
    torch.manual_seed(0)
    model = tiny_llama()
    model.model.layers[2].mlp = mlp()
    names = [f"model.layers.2.mlp.{target}" for target in targets]
    expected = [lowest_of_the_whole_model(model, name, BATCHES) for name in names]
    prune_model(model, BATCHES, "wanda", 0.5, targets=names, true_sequential=true_sequential)
    assert all(
        torch.equal(model.get_submodule(n).weight == 0, lowest) for n, lowest in zip(names, expected, strict=True)
    )


def test_a_mask_of_what_all_see_is_no_mask_of_padding():
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, attention_window=4, pad_token_id=1,
    )  # fmt: skip
    model = LongformerForSequenceClassification(config).eval()
    everywhere = torch.zeros(2, 12, dtype=torch.long)
    everywhere[:, 0] = 1
    batches = [
        {"input_ids": ids, "global_attention_mask": everywhere}
        for ids in torch.randint(3, 64, (3, 2, 12), generator=torch.Generator().manual_seed(0))
    ]
    name = "longformer.encoder.layer.1.intermediate.dense"
    expected = lowest_of_the_whole_model(model, name, batches)
    prune_model(model, batches, "wanda", 0.5, targets=[name])
    assert torch.equal(model.get_submodule(name).weight == 0, expected)


def test_experts_may_be_in_a_dictionary():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleDict({f"expert_{n}": Again() for n in range(2)})

        def forward(self, x):
            return self.experts["expert_0"](x)

    model = tiny_llama()
    model.model.layers[1].mlp = Experts()
    report = prune_model(model, BATCHES, "wanda", 0.5)
    tokens = {row.name: row.tokens for row in report.linears if "experts" in row.name}
    assert tokens == {
        "model.layers.1.mlp.experts.expert_0.up_proj": 2 * 3 * 2 * 16,
        "model.layers.1.mlp.experts.expert_1.up_proj": 0,
    }


def test_linears_in_a_dictionary_are_parts_of_a_layer():
    model = tiny_llama()
    model.model.layers[1].mlp.more = nn.ModuleDict({"one": nn.Linear(32, 32), "other": nn.Linear(32, 32)})
    assert {linear.experts for layer in decoder_layers(model) for linear in layer.linears} == {None}
