"""Whole prunings of a model by every method: seconds by phase, peak memory, and ratios to those done the plain way.

    python benchmarks/prune.py MODEL [CALIBRATION.txt] [--order one two] [--device cuda] [--repeat 3]
        [--forward float32 bfloat16]

The plain way is that of the published code: one sample a call, every layer forwarded twice in full, a hook on every
linear, each with a statistic of its own. "plain" is Wanda, "plain SparseGPT" has the loop of solver.py. Ours visit each
layer in two passes over the calibration set, or in one (``true_sequential``). With ``--forward bfloat16`` the model
runs under autocast. Runs take turns, and ratios are those of the medians of one run. Prints a Markdown table.
"""

import argparse
import copy
import itertools
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from solver import plain_sparsegpt
from torch import Tensor, nn

from wanda_lightning import (
    Ablate,
    CausalLM,
    InputNorm,
    Magnitude,
    SparseGPT,
    TextDataModule,
    Unstructured,
    Wanda,
    prune_model,
)
from wanda_lightning.calibration.walk import walk
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.statistics import InputHessian

PATTERN = Unstructured(0.5)
METHODS = {
    "magnitude": Magnitude(),
    "Wanda": Wanda(),
    "Wanda variant": Wanda(variant=True),
    "SparseGPT": SparseGPT(),
    "Ablate": Ablate(),
}


ORDERS = {"two": "two passes", "one": "one pass"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", nargs="?", default="builtin")
    parser.add_argument("--methods", nargs="+", choices=[*PLAIN, *METHODS], default=["plain", *METHODS])
    parser.add_argument("--order", nargs="+", choices=ORDERS, default=["two", "one"], help="how many passes a layer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--forward", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="see above")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()

    module = CausalLM(options.model, dtype=options.dtype)
    module.configure_model()
    model = module.model.eval().to(options.device)
    data = TextDataModule(
        options.calibration,
        tokenizer=module.tokenizer,
        num_samples=options.num_samples,
        sequence_length=options.sequence_length,
    )
    data.setup()
    samples = [batch["input_ids"].to(options.device) for batch in data.calibration_dataloader()]
    batches = torch.cat(samples).split(options.batch_size)

    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.repeat):
        for name, order, forward in itertools.product(options.methods, options.order, options.forward):
            calibrated = name in METHODS and METHODS[name].statistic is not None
            if not calibrated and order != options.order[0]:
                continue
            pruned = copy.deepcopy(model)
            in_half = torch.autocast(model.device.type, torch.bfloat16, enabled=forward == "bfloat16")
            with in_half, phases(pruned) as seconds:
                if name in PLAIN:
                    prune_the_plain_way(pruned, samples, PLAIN[name])
                else:
                    one_pass = calibrated and order == "one"
                    report = prune_model(pruned, batches, METHODS[name], PATTERN, true_sequential=one_pass)
                    seconds["solve"] = sum(row.seconds for row in report.linears)
            label = f"{name}, {ORDERS[order]}" if calibrated else name
            label += ", bfloat16" if forward == "bfloat16" else ""
            runs.setdefault(label, []).append(seconds)
            print(f"{label}: {seconds['total']:.1f} s", flush=True)

    medians = {
        name: {phase: statistics.median(run.get(phase, 0.0) for run in repeats) for phase in repeats[0]}
        for name, repeats in runs.items()
    }
    bases = [base for base in (*PLAIN, "Wanda, two passes") if base in medians]
    header = ["method", "total", "forward and rest", "statistics", "solve", "peak MiB", *(f"/ {b}" for b in bases)]
    print("\n| " + " | ".join(header) + " |\n| --- |" + " ---: |" * (len(header) - 1))
    for name, median in medians.items():
        solve = median.get("solve", 0.0)
        rest = median["total"] - median["statistics"] - solve
        numbers = [f"{value:.1f}" for value in (median["total"], rest, median["statistics"], solve)]
        ratios = [f"{median['total'] / medians[base]['total']:.2f}" for base in bases]
        print("| " + " | ".join([name, *numbers, f"{median['MiB']:.0f}", *ratios]) + " |")


@contextmanager
def phases(model: nn.Module) -> Iterator[dict[str, float]]:
    """Time a block and, within it, the updates of statistics; and take the peak of memory."""
    seconds = {"statistics": 0.0, "total": 0.0, "MiB": 0.0}
    cuda = model.device.type == "cuda"
    originals = {kind: kind.update for kind in (InputNorm, InputHessian)}

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(update):
        def wrapped(self, x):
            started = clock()
            update(self, x)
            seconds["statistics"] += clock() - started

        return wrapped

    for kind, update in originals.items():
        kind.update = timed(update)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # Linux only: elsewhere the peak is that of the process so far
            Path("/proc/self/clear_refs").write_text("5")
    started = clock()
    try:
        yield seconds
    finally:
        seconds["total"] = clock() - started
        for kind, update in originals.items():
            kind.update = update
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    seconds["MiB"] = peak  # with the two models: the dense one and the copy that is pruned


class PlainWanda:
    """What is gathered of a linear, and how it is then pruned."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI
        self.norm = InputNorm(weight_OI.shape[1], weight_OI.device)

    def update(self, x_1TI: Tensor) -> None:
        self.norm.update(x_1TI)

    def prune(self) -> None:
        score_OI = self.weight_OI.abs() * self.norm.compute()
        lowest_OP = score_OI.sort(dim=1, stable=True).indices[:, : score_OI.shape[1] // 2]
        self.weight_OI.scatter_(1, lowest_OP, 0)


class PlainSparseGPT:
    """The Hessian is a mean that goes on from sample to sample, as in the published code."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI
        self.hessian_II = weight_OI.new_zeros(weight_OI.shape[1], weight_OI.shape[1], dtype=torch.float32)
        self.samples = 0

    def update(self, x_1TI: Tensor) -> None:
        self.hessian_II *= self.samples / (self.samples + 1)
        self.samples += 1
        x_TI = (2 / self.samples) ** 0.5 * x_1TI.flatten(0, -2).float()
        self.hessian_II += x_TI.t() @ x_TI

    def prune(self) -> None:
        self.weight_OI.copy_(plain_sparsegpt(self.weight_OI, self.hessian_II, PATTERN))


PLAIN = {"plain": PlainWanda, "plain SparseGPT": PlainSparseGPT}


@torch.no_grad()
def prune_the_plain_way(model: nn.Module, samples: list[Tensor], kind: type[PlainWanda | PlainSparseGPT]) -> None:
    for step in walk(model, decoder_layers(model), samples):
        gathered = [kind(linear.weight_OI) for linear in step.layer.linears]
        hooks = [
            linear.module.register_forward_hook(lambda _, args, out, each=each: each.update(args[0]))
            for linear, each in zip(step.layer.linears, gathered, strict=True)
        ]
        for _ in step.outputs():
            pass
        for hook in hooks:
            hook.remove()
        for each in gathered:
            each.prune()
    for _ in step.outputs():  # the published code forwards the last layer again too
        pass


if __name__ == "__main__":
    main()
