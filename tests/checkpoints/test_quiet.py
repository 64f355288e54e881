"""Bars of loading are for models that take long to load."""

import pytest
from transformers.utils import logging

from wanda_lightning.checkpoints import quiet


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
@pytest.mark.parametrize("small", [True, False])
def test_only_large_models_have_bars(name, small, tmp_path, monkeypatch):
    monkeypatch.setattr(quiet, "SMALL", 4 if small else 3)
    (tmp_path / name).write_bytes(b"abc")
    model = tmp_path / name if name.endswith(".gguf") else tmp_path
    assert logging.is_progress_bar_enabled()
    with quiet.quiet_if_small(str(model)):
        assert logging.is_progress_bar_enabled() is not small
    assert logging.is_progress_bar_enabled()
