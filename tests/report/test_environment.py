"""What a report says of the machine."""

import pytest
import torch

from wanda_lightning.report.environment import environment


@pytest.mark.parametrize("in_use", [True, False])
def test_a_gpu_is_named_if_it_is_in_use(in_use, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert (environment()["device"] == "A GPU") == in_use
