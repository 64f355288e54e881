"""Where tensors are made if nobody says where, as after ``torch.set_default_device("cuda")``, makes no difference."""

import pytest
import torch
from helpers import tiny_llama, token_batches

from wanda_lightning import prune_depth, prune_model, prune_width
from wanda_lightning.allocation.split import cheapest_split


@pytest.fixture
def elsewhere():
    """A device that no tensor of a model or of a calibration set is on."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def width(**settings):
    return lambda model, _: prune_width(model, None, choice="magnitude", refit=False, **settings)


ALL = {
    "permute": lambda model, _: prune_model(model, None, "magnitude", "2:4", permute=True),
    "width": width(),
    "attention": width(attention_keep=0.5),
    "depth": lambda model, batches: prune_depth(model, batches, 1, choice="loss"),
}


@pytest.fixture(params=ALL)
def change(request):
    return ALL[request.param]


@pytest.fixture
def expected(change):
    model = tiny_llama()
    change(model, token_batches())
    return model


@pytest.fixture
def model():
    return tiny_llama()


def test_models_become_what_they_become_without(change, expected, model, batches, elsewhere):
    change(model, batches)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_a_split_is_found(elsewhere):
    assert cheapest_split([[0, 1, 4], [0, 2, 8]], [[0, 1, 2], [0, 1, 2]], total=3) == [2, 1]
