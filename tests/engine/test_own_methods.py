"""Methods of the user's own are held to what they say, and so are ours; errors name the linear and the method."""

import math

import pytest
import torch
from helpers import tiny_llama, token_batches

from wanda_lightning.allocation.allocator import Allocator
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import ADMM, PruningMethod, ScoreMethod
from wanda_lightning.statistics import InputNorm


class Own(PruningMethod):
    """Every second column goes."""

    statistic = None

    def prune(self, weight_OI, statistic, pattern):
        mask_OI = torch.ones_like(weight_OI, dtype=torch.bool)
        mask_OI[:, ::2] = False
        weight_OI.mul_(mask_OI)
        return mask_OI


class GivesNoMask(Own):
    def prune(self, *given):
        super().prune(*given)


class GivesNumbers(Own):
    def prune(self, *given):
        return super().prune(*given).float()


class GivesOneRow(Own):
    def prune(self, *given):
        return super().prune(*given)[:1]


class PrunesTooFew(Own):
    def prune(self, weight_OI, statistic, pattern):
        return torch.ones_like(weight_OI, dtype=torch.bool)


class LeavesWeights(Own):
    def prune(self, weight_OI, statistic, pattern):
        return super().prune(weight_OI.clone(), statistic, pattern)


class DividesByZero(Own):
    def prune(self, weight_OI, statistic, pattern):
        mask_OI = super().prune(weight_OI, statistic, pattern)
        weight_OI[0, 1] = math.nan
        return mask_OI


class ScoresWithNaN(ScoreMethod):
    statistic = None

    def score(self, weight_OI, statistic):
        return weight_OI.log()


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_a_method_that_does_what_it_says(llama, pattern):
    assert prune_model(llama, None, Own(), pattern).sparsity == 0.5


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (GivesNoMask(), r"its mask has to be torch\.bool \(32, 32\), got NoneType"),
        (GivesNumbers(), r"its mask has to be torch\.bool \(32, 32\), got torch\.float32 \(32, 32\)"),
        (GivesOneRow(), r"its mask has to be torch\.bool \(32, 32\), got torch\.bool \(1, 32\)"),
        (PrunesTooFew(), r"sparsity 0\.0 is not 0\.5|does not keep exactly 2"),
        (ScoresWithNaN(), r"sparsity 0\.\d+ is not 0\.5|does not keep exactly 2"),
        (LeavesWeights(), "it leaves weights where its mask has none"),
        (DividesByZero(), "it gives weights that are NaN or infinite in torch.float32"),
    ],
    ids=str,
)
def test_one_that_does_not_is_named_with_the_linear(llama, method, message, pattern):
    named = r"^model\.layers\.0\.self_attn\.q_proj cannot be pruned with \w+\(\): "
    with pytest.raises(ValueError, match=f"{named}.*({message})"):
        prune_model(llama, None, method, pattern)
    assert all(map(torch.equal, llama.parameters(), tiny_llama().parameters()))


class InputSize(InputNorm):
    def _add(self, x_TI):
        self.total += x_TI.abs().sum(0)

    def compute(self):
        return self.total


class ByInputSize(ScoreMethod):
    statistic = InputSize

    def score(self, weight_OI, statistic):
        return weight_OI.abs() * statistic.compute()


def test_a_statistic_of_ones_own(batches):
    ours, plain = tiny_llama(layers=1), tiny_llama(layers=1)
    prune_model(ours, batches, ByInputSize(), 0.5, targets=["q_proj"])
    inputs = []
    plain.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in batches:
        plain(batch)
    score = plain.model.layers[0].self_attn.q_proj.weight.abs() * torch.cat(inputs).flatten(0, 1).abs().sum(0)
    lowest = score.argsort(dim=1)[:, :16]
    expected = plain.model.layers[0].self_attn.q_proj.weight.scatter(1, lowest, 0)
    assert torch.equal(ours.model.layers[0].self_attn.q_proj.weight, expected)


@pytest.mark.parametrize("setting", ["exact_error", "dense_target"])
def test_a_statistic_of_ones_own_is_not_replaced_by_another(llama, batches, setting):
    message = rf"{setting} gathers X\^T X, and ByInputSize\(\) needs InputSize: leave {setting} out"
    with pytest.raises(ValueError, match=message):
        prune_model(llama, batches, ByInputSize(), 0.5, **{setting: True})


class WithSettings(ByInputSize):
    def __init__(self, **settings):
        vars(self).update(settings)


class ByPosition(Allocator):
    def __init__(self, **settings):
        vars(self).update(settings)

    def allocate(self, task):
        return self.allotment({linear.name: task.pattern for linear in task.linears})


@pytest.mark.parametrize("kind", [WithSettings, ByPosition])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"power": 2}, "power=2"),
        ({"scale": torch.ones(2)}, "scale=tensor([1., 1.])"),
        ({"how": lambda score: score}, "how=<function <lambda>>"),
        ({"power": 2, "_seen": [1]}, "power=2"),
    ],
)
def test_it_is_named_by_its_settings_alike_in_every_process(kind, settings, named):
    assert str(kind(**settings)) == f"{kind.__name__}({named})"


def test_refine_needs_a_hessian(llama, batches):
    method = ByInputSize()
    method.refine = 5
    with pytest.raises(ValueError, match=r"ByInputSize\(refine=5\) has refine, which needs InputHessian"):
        prune_model(llama, batches, method, 0.5)


def test_weights_that_half_precision_cannot_hold_are_an_error():
    """Of four inputs that are small two have to stay, and make up for others with weights that are as large."""
    model = tiny_llama(layers=1)
    model.model.layers[0].post_attention_layernorm.weight.data[4:8] = 1e-3
    model.model.layers[0].mlp.up_proj.weight.data *= 1000
    with pytest.raises(ValueError, match=r"mlp\.up_proj cannot be pruned with ADMM.* infinite in torch\.float16"):
        prune_model(model.half(), token_batches(), ADMM(), "2:4", targets=["up_proj"])
