import pytest
import torch

from wanda_lightning.allocation.by_name import allocate
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import SparseGPT, Wanda
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.sparsity import SemiStructured, Unstructured


@pytest.fixture
def linears(llama):
    return [linear for layer in decoder_layers(llama) for linear in layer.linears]


def test_later_entries_win(linears):
    patterns = allocate(
        linears, Unstructured(0.5), {"layers.0.*": 0.25, "q_proj": "2:4", "layers.0.self_attn.q_proj": 0}
    )
    assert patterns["model.layers.0.mlp.up_proj"] == Unstructured(0.25)
    assert patterns["model.layers.1.self_attn.q_proj"] == SemiStructured(2, 4)
    assert patterns["model.layers.0.self_attn.q_proj"] == Unstructured(0)
    assert patterns["model.layers.1.mlp.up_proj"] == Unstructured(0.5)
    assert patterns.keys() == {linear.name for linear in linears}


@pytest.mark.parametrize("allocation", [None, {}])
def test_nothing_allocated_is_uniform(linears, allocation):
    assert set(allocate(linears, SemiStructured(2, 4), allocation).values()) == {SemiStructured(2, 4)}


def test_every_linear_reaches_its_own_target(llama, batches):
    report = prune_model(
        llama, batches, SparseGPT(), Unstructured(0.5), allocation={"v_proj": 0.25, "down_proj": "1:4", "layers.2.*": 0}
    )
    for row in report.linears:
        expected = 0 if ".2." in row.name else {"v_proj": 0.25, "down_proj": 0.75}.get(row.name.split(".")[-1], 0.5)
        assert row.sparsity == expected
        assert (llama.get_parameter(f"{row.name}.weight") == 0).float().mean() == expected
    assert report.target_sparsity == 0.5
    assert report.matches == {"v_proj": 3, "down_proj": 3, "layers.2.*": 7}


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ({"qproj": 0.5}, "'qproj' matches no linear"),
        ({"lm_head": 0.5}, "'lm_head' matches no linear"),
        ({"o_proj": 0.5}, "'o_proj' matches no linear"),  # ignored below
        ({"q_proj": 1.5}, r"allocation of 'q_proj'.*\[0, 1\), got 1\.5"),
        ({"q_proj": True}, r"allocation of 'q_proj'.*got True"),
        ({"q_proj": None}, r"allocation of 'q_proj'.*got None"),
        ({"q_proj": "half"}, r"allocation of 'q_proj'.*got 'half'"),
        ({"q_proj": "4:2"}, r"allocation of 'q_proj'.*4:2"),
        ({"q_proj": 124}, r'YAML reads an unquoted 2:4.*write pattern: "2:4"'),
        ({"q_proj": "3:7"}, "q_proj has 32 input features.*groups of 7"),
        ({"q_proj": "3:6"}, "block_size must be a multiple of 6"),
    ],
)
def test_bad_allocations_are_refused_before_any_weight_changes(llama, batches, allocation, message):
    before = [parameter.clone() for parameter in llama.parameters()]
    method = SparseGPT() if "3:6" in allocation.values() else Wanda()
    with pytest.raises(ValueError, match=message):
        prune_model(llama, batches, method, Unstructured(0.5), ignore=["o_proj"], allocation=allocation)
    assert all(map(torch.equal, llama.parameters(), before))
