"""How fast the device is, is told quickly where half precision is slow, and the estimates follow from it."""

import pytest
import torch
from helpers import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from wanda_lightning.inspection import estimates, speed
from wanda_lightning.inspection.inspect_model import inspect_model

HALF = (torch.bfloat16, torch.float16)


class Clock:
    """Time that passes only when something is computed."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Processor(TorchDispatchMode):
    """A processor without units for half precision: such products take a thousand times as long as others.

    They are not computed; the clock goes on, and the largest is remembered.
    """

    def __init__(self, clock: Clock, rate: float = 1e11, half_rate: float = 1e8, sorting: float = 3e7) -> None:
        super().__init__()
        self.start = 0.0  # of each operation
        self.clock, self.rate, self.half_rate, self.sorting = clock, rate, half_rate, sorting
        self.half_operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__ if hasattr(function, "overloadpacket") else str(function)
        result = function(*args, **(kwargs or {})) if name != "mm" else args[0].new_ones(len(args[0]), args[1].shape[1])
        if name == "mm" and args[0].device.type == "cpu":
            operations = 2 * args[0].numel() * args[1].shape[1]
            half = args[0].dtype in HALF
            self.half_operations += operations if half else 0
            self.clock.now += self.start + operations / (self.half_rate if half else self.rate)
        elif name == "sort":
            self.clock.now += self.start + args[0].numel() / self.sorting
        return result


@pytest.fixture
def processor(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return Processor(clock)


@pytest.mark.parametrize("half_rate", [1e7, 1e8, 1e9, 1e11, 1e13])
@pytest.mark.parametrize("dtype", HALF)
def test_a_rate_is_found_in_time(processor, half_rate, dtype):
    processor.half_rate = half_rate
    with processor:
        assert speed.product_rate(dtype, "cpu") == pytest.approx(half_rate)
    smallest = (1 + speed.TRIES) * 2 * speed.SMALLEST**3 / half_rate
    assert processor.clock.now < max(2 * speed.SECONDS, smallest)


def test_a_busy_machine_is_not_taken_for_a_slow_one(processor):
    """Where others compute, threads start late: here by 40 ms, in which 4 billion operations could be done."""
    processor.start = 0.04
    with processor:
        assert speed.product_rate(torch.float32, "cpu") > processor.rate / 4
        assert speed.sorting_rate("cpu") > processor.sorting / 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inspect_computes_little_in_half_precision(processor, tmp_path, dtype):
    """A product of size 2048 would have 17 billion operations: minutes on such a processor."""
    tiny_llama().config.save_pretrained(tmp_path)
    with processor:
        slow = inspect_model(str(tmp_path), dtype=dtype)
        assert 0 < processor.half_operations < 1e8
        assert processor.clock.now < 1.5
        fast = inspect_model(str(tmp_path), dtype="float32")
    assert slow.seconds["Wanda"] > 100 * fast.seconds["Wanda"]
    assert processor.half_operations < 1e8


def test_the_rates_of_this_machine():
    assert speed.product_rate(torch.float32, "cpu") > 1e7
    assert speed.sorting_rate("cpu") > 1e4


def test_seconds_are_operations_by_rate(monkeypatch, tmp_path):
    """Against a plain sum over the linears of two layers."""
    monkeypatch.setattr(estimates, "product_rate", lambda dtype, _: 1e6 if dtype == torch.float32 else 1e3)
    monkeypatch.setattr(estimates, "sorting_rate", lambda _: 1e5)
    model = tiny_llama(layers=2)
    model.config.save_pretrained(tmp_path)
    linears = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    windows, tokens = 3, 20
    forward = sum(2 * windows * tokens * weight.numel() for weight in linears)
    forward += 2 * windows * 2 * tokens**2 * 32  # attention of two layers of width 32
    masks = 2 * sum(weight.numel() for weight in linears) / 1e5
    inputs = 2 * [32, 32, 32, 64]  # of q/k/v, o, gate/up and down in each layer
    exact = sum(1.13 * windows * tokens * width**2 + width**3 for width in inputs)
    exact += sum(2 * weight.numel() * weight.shape[1] for weight in linears)
    for dtype, rate in (("float32", 1e6), ("bfloat16", 1e3)):
        found = inspect_model(str(tmp_path), windows, tokens, dtype)
        assert found.seconds["Wanda"] == pytest.approx(forward / rate + masks)
        assert found.seconds["SparseGPT, Ablate"] == pytest.approx(forward / rate + masks + exact / 1e6)
        assert found.timed_for.startswith(f"3 windows of 20 tokens in {dtype} on the CPU with ")


def test_layers_may_differ_in_the_size_of_their_heads():
    from transformers import LlamaConfig

    size = {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = LlamaConfig(**size, per_layer_config={1: {"head_dim": 16}})
    assert estimates._attention(config, 2, 10) == 2 * 10**2 * 4 * (8 + 16)


def test_types_that_nothing_is_computed_in_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_rate", lambda *_: pytest.fail("something was timed"))
    config = tiny_llama().config
    config.save_pretrained(tmp_path)
    for dtype in ("float8_e4m3fn", "int8", "float", "nothing", ""):
        with pytest.raises(ValueError, match=f"dtype must be one of auto, float32, bfloat16, .*got '{dtype}'"):
            inspect_model(str(tmp_path), dtype=dtype)
    config.dtype = "float8_e4m3fn"
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is stored in float8_e4m3fn, in which nothing can be pruned"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_zeros_are_counted_in_any_type(tmp_path, dtype):
    """Weights may be stored in a type that the config does not name."""
    from safetensors.torch import load_file, save_file

    tiny_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.arange(tensors[name].numel()).reshape(tensors[name].shape).remainder(4).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (linear,) = (x for x in inspect_model(str(tmp_path)).weights.linears if x.sparsity)
    assert f"{linear.name}.weight" == name
    assert linear.sparsity == 0.25
    assert "3:4" in linear.patterns
