"""How many heads a config says there are."""

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, MambaConfig, OPTConfig

from wanda_lightning.model.heads import Heads

SIZE = {"hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (LlamaConfig(**SIZE, num_key_value_heads=2), Heads((), heads=4, groups=2, size=8)),
        (LlamaConfig(**SIZE, num_key_value_heads=2, head_dim=16), Heads((), heads=4, groups=2, size=16)),
        (OPTConfig(**SIZE), Heads((), heads=4, groups=4, size=8)),
    ],
)
def test_heads_are_those_of_the_config(config, heads):
    assert Heads.of(SimpleNamespace(config=config)) == heads


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(**SIZE, num_key_value_heads=3), "num_attention_heads=4, num_key_value_heads=3, head_dim=8"),
        (MambaConfig(hidden_size=32), "num_attention_heads=None, num_key_value_heads=None, head_dim=None"),
    ],
)
def test_heads_that_are_not_known_are_refused(config, said):
    with pytest.raises(ValueError, match=f"{said}: key/value groups can be removed where every layer has as many"):
        Heads.of(SimpleNamespace(config=config))
