"""Which columns stay, by sums over all rows in float64; what the others make up for is in tests/solvers."""

import pytest
import torch
from least_squares import random

from wanda_lightning.engine.neuron_removal import Columns, NeuronRemoval
from wanda_lightning.statistics import InputNorm


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("choice", ["magnitude", "wanda"])
def test_the_largest_stay_also_of_weights_in_half_precision(choice, block):
    weight, norm = random(2000, 24).bfloat16(), InputNorm(24)  # column sums differ by less than bfloat16 can tell
    norm.update((1 + 0.01 * random(1, 24, seed=1)).float())
    score = weight.double().abs() * (norm.compute().double() if choice == "wanda" else 1)
    sums = score.sum(0).view(-1, block).sum(1).tolist()
    largest = sorted(range(24 // block), key=sums.__getitem__)[-12 // block :]
    pruned, columns = weight.clone(), Columns(0.5, kept=12, block=block)
    mask = NeuronRemoval(choice, refit=False, shrinkage=0.0).prune(pruned, norm, columns)
    assert sorted({column // block for column in mask[0].nonzero().flatten().tolist()}) == sorted(largest)
    columns.check_mask(mask, 0.0)
    assert torch.equal(pruned, weight * mask)
