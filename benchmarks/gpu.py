"""What a GPU makes of this package, in 8 minutes: tests, the fused kernel, whole prunings, streaming, 2:4 kernels.

    python benchmarks/gpu.py [--output gpu.json]
    python benchmarks/gpu.py --small --device cpu

Needs torch, transformers and this package, and no network: models have random weights in the shapes of Llama-3.2-1B and
Llama-3.1-8B, in bfloat16. Prints a Markdown table, row by row, and writes the rows as JSON after each, so that a run
that is cut off still tells what it measured. A step that fails is a row with the reason; what is not begun in --minutes
is left out. ``--small`` takes every step in a tiny size.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

from wanda_lightning import InputHessian, Magnitude, SemiStructured, SparseGPT, Unstructured, Wanda, prune_model
from wanda_lightning.checkpoints.loading import load_streamed
from wanda_lightning.engine.journal import Journal
from wanda_lightning.export.semi_structured import to_semi_structured
from wanda_lightning.solvers import obs, triton_obs
from wanda_lightning.sparsity import Pattern

Found = dict[str, Any]
REPOSITORY = Path(__file__).parents[1]
METHODS = {"Wanda": Wanda(), "SparseGPT": SparseGPT()}
ORDERS = {"one pass": True, "two passes": False}

# (hidden size, intermediate size, layers, heads, heads of keys, vocabulary), calibration windows, tokens of a window
LARGE = {"1B": (2048, 8192, 16, 32, 8, 128256), "8B": (4096, 14336, 32, 32, 8, 128256)}, 128, 2048
SMALL = {"tiny": (64, 128, 2, 4, 2, 256)}, 16, 32
WINDOWS_A_CALL = 8
BLOCK = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    started = time.perf_counter()
    on_gpu = options.device.type == "cuda"
    name = torch.cuda.get_device_name(options.device) if on_gpu else "the CPU: not measured on a GPU"
    rows: list[Found] = [{"device": name, "torch": torch.__version__}]
    print(f"On {name}, torch {torch.__version__}\n\n| step | case | measured |\n| --- | --- | --- |", flush=True)
    for step, case, measure in steps(options.device, options.small):
        in_time = time.perf_counter() - started < 60 * options.minutes
        found = measured(measure) if in_time else {"not begun": f"in {options.minutes:g} minutes"}
        rows.append({"step": step, "case": case, **found})
        options.output.write_text(json.dumps(rows, indent=2) + "\n")
        print(f"| {step} | {case} | {', '.join(f'{key} {value}' for key, value in found.items())} |", flush=True)


def measured(measure: Callable[[], Found]) -> Found:
    """Take a step; whatever goes wrong is what was found."""
    try:
        return {key: float(f"{v:.3g}") if isinstance(v, float) else v for key, v in measure().items()}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def steps(device: torch.device, small: bool) -> Iterator[tuple[str, str, Callable[[], Found]]]:
    """Yield what is to be measured: the step, the case, and a function that measures it."""
    shapes, windows, length = SMALL if small else LARGE
    hidden, intermediate, *_ = list(shapes.values())[-1]
    patterns = Unstructured(0.5), SemiStructured(2, 4)
    yield "tests", "marked gpu", run_tests
    for columns, pattern in product((hidden, intermediate), patterns):
        case = f"{hidden} x {columns}, {pattern}"
        yield "fused kernel", case, partial(compare_kernels, hidden, columns, pattern, device)
    for rows, tokens in product((hidden, intermediate), (1, 64, 4096)):
        case = f"{rows} x {hidden}, {tokens} tokens"
        yield "2:4 kernels", case, partial(compare_linears, rows, hidden, tokens, device)
    runs = list(product(METHODS, ORDERS))
    for (shape, sizes), (method, order) in product(shapes.items(), runs):
        ids = torch.randint(sizes[-1], (windows, length), generator=torch.Generator().manual_seed(0))
        yield "in memory", f"{shape}, {method}, {order}", partial(prune, sizes, ids, method, order, device)
        if sizes == next(iter(shapes.values())):
            yield "streamed", f"{shape}, {method}, {order}", partial(prune_streamed, sizes, ids, method, order, device)


def run_tests() -> Found:
    """Run the tests that are marked gpu."""
    files = [str(file) for file in (REPOSITORY / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    return {"pytest": done.stdout.strip().rpartition("\n")[2] or done.stderr.strip().rpartition("\n")[2]}


def compare_kernels(rows: int, columns: int, pattern: Pattern, device: torch.device) -> Found:
    """Time SparseGPT's solver with the fused kernel and with the eager loop, and compare rows of the same mask."""
    torch.manual_seed(0)
    hessian = InputHessian(columns, device)
    hessian.update(torch.randn(2 * columns, columns, device=device) @ torch.randn(columns, columns, device=device))
    factor, weight_OI = hessian.factor(0.01), torch.randn(rows, columns, device=device)
    importance_I = factor.lower_II.diagonal()

    def solve() -> tuple[float, Tensor, Tensor]:
        pruned_OI = weight_OI.clone()
        obs.prune_with_scores(weight_OI.clone(), factor, importance_I, pattern, BLOCK)  # compiles, and warms up
        with stopwatch(device) as seconds:
            mask_OI = obs.prune_with_scores(pruned_OI, factor, importance_I, pattern, BLOCK)
        return seconds[0], pruned_OI, mask_OI

    fused, fused_OI, fused_mask_OI = solve()
    with without_fused_kernel():
        eager, eager_OI, mask_OI = solve()
    n_of_m = (pattern.n, pattern.m) if isinstance(pattern, SemiStructured) else ()
    runs = device.type in obs.FUSED_DEVICES and triton_obs.works(device, BLOCK, *n_of_m)  # else the loop took over
    same_O = (fused_mask_OI == mask_OI).all(dim=1)
    difference = (fused_OI - eager_OI)[same_O].abs().max() / eager_OI.abs().max()
    return {
        "fused": runs,
        "fused ms": 1e3 * fused,
        "eager ms": 1e3 * eager,
        "ratio": eager / fused,
        "rows of the same mask": float(same_O.float().mean()),
        "largest relative difference there": float(difference),
    }


@contextmanager
def without_fused_kernel() -> Iterator[None]:
    devices, obs.FUSED_DEVICES = obs.FUSED_DEVICES, []
    try:
        yield
    finally:
        obs.FUSED_DEVICES = devices


@torch.inference_mode()
def compare_linears(rows: int, columns: int, tokens: int, device: torch.device) -> Found:
    """Time a linear on some tokens, dense and as torch's 2:4 kernels compute it."""
    linear = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device=device)
    Magnitude().prune(linear.weight.detach(), None, SemiStructured(2, 4))
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"linear": linear})])
    x_TI = torch.randn(tokens, columns, dtype=torch.bfloat16, device=device)

    def median_ms() -> float:
        return (
            1e3 * Timer("linear(x)", globals={"linear": linear, "x": x_TI}).blocked_autorange(min_run_time=0.2).median
        )

    dense, expected_TO = median_ms(), linear(x_TI)
    to_semi_structured(model)
    sparse = median_ms()
    difference = (linear(x_TI) - expected_TO).float().norm() / expected_TO.float().norm()
    return {"dense ms": dense, "2:4 ms": sparse, "ratio": dense / sparse, "difference": float(difference)}


def prune(sizes: tuple[int, ...], ids: Tensor, method: str, order: str, device: torch.device) -> Found:
    """Prune a random model that is on the device."""
    return pruning(random_model(sizes, device), ids, method, order, device)


def prune_streamed(sizes: tuple[int, ...], ids: Tensor, method: str, order: str, device: torch.device) -> Found:
    """Prune the same model layer by layer from disk."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(sizes, device).save_pretrained(f"{folder}/dense")
        model = load_streamed(f"{folder}/dense", device=device)
        return pruning(model, ids, method, order, device, journal=Journal(Path(folder) / "layers"))


def pruning(model: Any, ids: Tensor, method: str, order: str, device: torch.device, **settings: Any) -> Found:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with stopwatch(device) as seconds:
        report = prune_model(
            model,
            ids.split(WINDOWS_A_CALL),
            METHODS[method],
            Unstructured(0.5),
            true_sequential=ORDERS[order],
            **settings,
        )
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else "not measured"
    phases = {f"{phase} s": spent for phase, spent in report.seconds_by_phase.items()}
    return {"s": seconds[0], **phases, "peak GiB": peak, "sparsity": report.sparsity, "order": report.order}


def random_model(sizes: tuple[int, ...], device: torch.device) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, key_heads, vocabulary = sizes
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM._from_config(config).eval()


@contextmanager
def stopwatch(device: torch.device) -> Iterator[list[float]]:
    """Time a block, the device's work included; the seconds are in the list afterwards."""
    seconds: list[float] = []
    started = clock(device)
    yield seconds
    seconds.append(clock(device) - started)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
