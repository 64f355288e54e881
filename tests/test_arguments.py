from fractions import Fraction

import numpy as np
import pytest
import torch

from wanda_lightning.allocation.schedule import Gradual
from wanda_lightning.arguments import (
    checked_device,
    checked_dtype,
    is_finite,
    is_fraction,
    is_whole,
    plain,
    whole_number,
)
from wanda_lightning.methods import SparseGPT
from wanda_lightning.sparsity import Unstructured, as_pattern, parse_pattern
from wanda_lightning.training.lora import LoraSettings


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_what_is_no_whole_number_is_refused_by_name(value):
    assert not is_whole(value, 1)
    with pytest.raises(ValueError, match=f"rows must be a whole number of at least 1, got {value!r}"):
        whole_number("rows", value, 1)


def test_whole_numbers_pass():
    assert is_whole(1, 1)
    whole_number("rows", 0, 0)


@pytest.mark.parametrize(
    ("value", "is_one"), [(0, True), (-1.5, True), (10**400, True), (float("nan"), False), (float("-inf"), False),
                          (True, False), ("1", False), (None, False)],
)  # fmt: skip
def test_what_a_finite_number_is(value, is_one):
    assert is_finite(value) == is_one


@pytest.mark.parametrize(
    ("given", "meant"),
    [(np.int64(8), 8), (np.float32(0.7), 0.7), (np.float16(0.7), 0.7), (np.float64(0.1), 0.1), (Fraction(1, 4), 0.25),
     ({"q_proj": np.float32(0.2), "up_proj": "2:4"}, {"q_proj": 0.2, "up_proj": "2:4"})],
)  # fmt: skip
def test_numpys_numbers_are_made_plain(given, meant):
    assert repr(plain(given)) == repr(meant)


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", None, np.array([1.0])])
def test_what_is_no_number_stays(value):
    assert plain(value) is value


@pytest.mark.parametrize(
    ("swept", "settings"),
    [
        (SparseGPT(np.int64(64), np.float32(0.02), np.int32(2)), SparseGPT(64, 0.02, 2)),
        (Gradual(np.int64(0), np.int64(8), initial=np.float32(0.2)), Gradual(0, 8, initial=0.2)),
        (LoraSettings(np.int64(4), np.float32(8)), LoraSettings(4, 8.0)),
        (as_pattern(np.float32(0.7)), Unstructured(0.7)),
        (parse_pattern("2:4", np.float32(0.5)), as_pattern("2:4")),
    ],
)
def test_settings_may_be_numpys_numbers(swept, settings):
    assert repr(swept) == repr(settings)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_fractions(value):
    assert is_fraction(value)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, float("nan"), False, "0.5", None])
def test_what_is_no_fraction(value):
    assert not is_fraction(value)


@pytest.mark.parametrize(
    ("dtype", "meant"), [("auto", None), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64)]
)
def test_dtypes(dtype, meant):
    assert checked_dtype(dtype) is meant


@pytest.mark.parametrize("dtype", ["bf16", "Linear", torch.int8, None, 16])
def test_what_is_no_dtype_to_compute_in(dtype):
    with pytest.raises(ValueError, match=f"dtype must be one of auto, float32, .*, got {dtype!r}"):
        checked_dtype(dtype)


@pytest.mark.parametrize("accelerator", [None, torch.device("mps")])
def test_the_device_is_a_gpu_of_any_kind_if_there_is_one(monkeypatch, accelerator):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    assert checked_device(None) == (accelerator or torch.device("cpu"))


@pytest.mark.parametrize("device", ["nothing", "cuda:99"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here: "):
        checked_device(device)
