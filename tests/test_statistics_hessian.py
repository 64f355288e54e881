import pytest
import torch

from wanda_lightning.statistics import InputHessian, InputNorm


def inputs(tokens: int = 200, features: int = 37, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    return torch.randn(tokens, features, generator=generator) @ mixing


def hessian_of(*batches: torch.Tensor, **kwargs) -> InputHessian:
    hessian = InputHessian(batches[0].shape[-1], **kwargs)
    for batch in batches:
        hessian.update(batch)
    return hessian


@pytest.mark.parametrize("features", [1, 5, 8, 37, 64])
def test_is_the_scaled_second_moment(features):
    x = inputs(features=features)
    computed = hessian_of(x).compute()
    torch.testing.assert_close(computed, (2 / 200 * x.double().t() @ x.double()).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(computed, computed.t())


def test_golden_hessians_of_the_reference(golden, golden_cases):
    for case in golden_cases:
        x = golden[f"{case['case']}.inputs"]
        hessian = hessian_of(*x)
        ours = hessian.compute() * hessian.tokens / case["nsamples"]  # the reference divides by samples, not tokens
        torch.testing.assert_close(ours, golden[f"{case['case']}.hessian"], rtol=1e-5, atol=1e-3)


def test_does_not_depend_on_batches_or_chunks(monkeypatch):
    x = inputs()
    whole = hessian_of(x, dtype=torch.float64)
    split = hessian_of(x[:64].reshape(2, 32, 37), x[64:65], x[65:], dtype=torch.float64)
    monkeypatch.setattr(InputHessian, "chunk", 7)
    chunked = hessian_of(x, dtype=torch.float64)
    for other in (split, chunked):
        assert other.tokens == whole.tokens == 200
        torch.testing.assert_close(other.compute(), whole.compute(), rtol=1e-12, atol=1e-12)


def test_merge_adds_up():
    x = inputs()
    whole, left, right = hessian_of(x), hessian_of(x[:50]), hessian_of(x[50:])
    left.merge(right)
    assert left.tokens == 200
    torch.testing.assert_close(left.compute(), whole.compute(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing(dtype):
    x = inputs().to(dtype)
    expected = 2 / 200 * x.double().t() @ x.double()
    torch.testing.assert_close(hessian_of(x).compute().double(), expected, rtol=1e-5, atol=1e-3)


def test_stays_float32_where_users_allow_less():
    x = inputs(tokens=512, features=256)
    expected = hessian_of(x).compute()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(hessian_of(x).compute(), expected)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # left as it was found
    finally:
        torch.set_float32_matmul_precision(before)


def test_norm_is_wandas():
    x = inputs()
    norm = InputNorm(37)
    norm.update(x)
    torch.testing.assert_close(hessian_of(x).norm().compute(), norm.compute())
    assert hessian_of(x).norm().tokens == norm.tokens


def test_norm_goes_on_apart_from_the_hessian():
    x = inputs(20, 8)
    hessian = hessian_of(x)
    hessian.norm().update(x)
    assert torch.equal(hessian.compute(), hessian_of(x).compute())


def test_output_energy_is_exact_and_its_diagonal_estimate_is_not():
    x = inputs()
    weight = torch.randn(11, 37, generator=torch.Generator().manual_seed(5))
    expected = (x.double() @ weight.double().t()).square().sum(0).float()
    torch.testing.assert_close(hessian_of(x).output_energy(weight), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(hessian_of(x).output_energy(weight.bfloat16()), expected, rtol=3e-2, atol=0)
    norm = InputNorm(37)
    norm.update(x)
    estimate = norm.output_energy(weight)
    torch.testing.assert_close(estimate, (weight.square() * x.square().sum(0)).sum(1), rtol=1e-5, atol=0)
    assert ((estimate - expected).abs() > 0.01 * expected).any()


def test_output_energy_estimate_is_exact_for_uncorrelated_inputs():
    x = torch.eye(9) * torch.arange(1.0, 10)
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(5))
    norm = InputNorm(9)
    norm.update(x)
    torch.testing.assert_close(norm.output_energy(weight), hessian_of(x).output_energy(weight))


def test_factor_is_shared_until_the_sums_change():
    x = inputs()
    hessian = hessian_of(x)
    factor = hessian.factor(0.01)
    assert hessian.factor(0.01) is factor
    assert hessian.factor(0.1) is not factor
    for change in (
        lambda: hessian.update(x),
        lambda: hessian.merge(hessian_of(x)),
    ):
        before = hessian.factor(0.01)
        change()
        assert hessian.factor(0.01) is not before


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match="37 features"):
        InputHessian(37).update(torch.randn(5, 36))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_sums_are_exact_in_the_inputs(dtype):
    x = inputs(tokens=4096, features=256).to("cuda", dtype)
    expected = (2 / 4096 * x.double().t() @ x.double()).float()
    scale = expected.diagonal().max()
    assert (hessian_of(x, device="cuda").compute() - expected).abs().max() < 1e-5 * scale
