import pytest
import torch

from wanda_lightning.arguments import checked_device, checked_dtype, is_finite, is_fraction, is_whole, whole_number


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
