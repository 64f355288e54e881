"""Where tensors are made if nobody says where, as after ``torch.set_default_device("cuda")``, makes no difference."""

import pytest
import torch
from helpers import tiny_llama, token_batches

from wanda_lightning import OWL, Reconstruction, SparseGPT, TextDataModule, prune_depth, prune_model, prune_width
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
    "wanda": lambda model, batches: prune_model(model, batches, "wanda", 0.5),
    "balanced": lambda model, batches: prune_model(
        model, batches, SparseGPT(shrinkage=0.3), "2:4", dense_target=True, reconstruction=Reconstruction(1)
    ),
    "ADMM": lambda model, batches: prune_model(model, batches, "admm", 0.5, allocation=OWL(), exact_error=True),
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


def test_windows_are_where_they_are_without(tokenizer, elsewhere):
    data = TextDataModule(tokenizer=tokenizer, num_samples=2, sequence_length=16, keep_last_window=True)
    data.setup()
    splits = [data._windows_of("calibration")[0], *data._windows_of("evaluation")]  # a DataLoader fails by itself there
    assert {str(windows.device) for windows in splits} == {"cpu"}
