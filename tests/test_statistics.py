import pytest
import torch

from wanda_lightning.statistics import InputHessian, InputNorm


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def norm_of(*batches: torch.Tensor) -> InputNorm:
    norm = InputNorm(batches[0].shape[-1])
    for batch in batches:
        norm.update(batch)
    return norm


def test_norm_is_the_l2_norm_over_all_tokens():
    x = inputs(3, 5, 8)
    expected = torch.linalg.vector_norm(x.double().reshape(-1, 8), dim=0)
    torch.testing.assert_close(norm_of(x).compute().double(), expected, rtol=1e-6, atol=0)
    assert norm_of(x).tokens == 15


@pytest.mark.parametrize(("tokens", "features"), [(2500, 2**12), (2, InputNorm.at_once + 1)])
def test_norm_of_more_inputs_than_are_squared_at_a_time(tokens, features):
    x = inputs(tokens, features)
    expected = torch.linalg.vector_norm(x.double(), dim=0)
    torch.testing.assert_close(norm_of(x).compute().double(), expected, rtol=1e-6, atol=0)
    assert norm_of(x).tokens == tokens


def test_norm_does_not_depend_on_how_tokens_are_split():
    x = inputs(4, 6, 8)
    whole = norm_of(x).compute()
    torch.testing.assert_close(norm_of(*x).compute(), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm_of(*x.reshape(-1, 8).split([1, 2, 3, 18])).compute(), whole, rtol=1e-6, atol=0)
    merged = norm_of(x[:1])
    merged.merge(norm_of(x[1:]))
    assert merged.tokens == 24
    torch.testing.assert_close(merged.compute(), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32_for_half_precision_inputs(dtype):
    x = (300 * inputs(4096, 4)).to(dtype)  # the squares overflow float16, and bfloat16 sums stop growing
    expected = torch.linalg.vector_norm(x.double(), dim=0)
    torch.testing.assert_close(norm_of(x).compute().double(), expected, rtol=1e-5, atol=0)


def test_golden_activation_statistic(golden, golden_cases):
    for i, case in enumerate(golden_cases):
        if f"case{i}.scaler_row" not in golden:
            continue
        mean = norm_of(*golden[f"case{i}.inputs"]).compute().square() / case["nsamples"]
        torch.testing.assert_close(mean, golden[f"case{i}.scaler_row"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [InputNorm, InputHessian])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_one_input_that_overflows_is_seen(kind, value):
    x = inputs(5, 8)
    statistic = kind(8)
    statistic.update(x)
    assert statistic.is_finite
    x[3, 6] = value
    statistic.update(x)
    assert not statistic.is_finite


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"8 features, got a tensor of shape \(2, 9\)"):
        InputNorm(8).update(inputs(2, 9))
