"""ADMM's settings by the error of a few layers' outputs on windows that were not calibrated on.

    python benchmarks/admm_settings.py MODEL CALIBRATION.txt [--layers 2 14 27] [--windows 32] [--held-out 16]

Windows of 512 tokens of the calibration text, seed 0, go through the dense model. Every linear is pruned with what the
first windows brought; its error ||(W - W') X||^2 / ||W X||^2 is measured on the others. Prints the mean over the
linears for a grid around the defaults, beside SparseGPT, with and without conjugate gradients. No evaluation text is
looked at.
"""

import argparse
import time
from collections.abc import Iterator

import torch
from torch import nn

from wanda_lightning import ADMM, CausalLM, InputHessian, PruningMethod, SparseGPT, TextDataModule, Wanda
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.sparsity import Pattern, SemiStructured, Unstructured

PATTERNS = [Unstructured(0.5), Unstructured(0.7), SemiStructured(2, 4)]


def methods() -> Iterator[PruningMethod]:
    """Those of one table: every setting of ADMM is varied alone."""
    for steps in (0, 5, 10, 20, 50, 100):
        yield SparseGPT(refine=steps)
    yield Wanda(refine=20)
    yield ADMM()
    yield from (ADMM(steps=steps) for steps in (10, 20, 80))
    yield from (ADMM(rho=rho) for rho in (0.3, 0.5, 3.0))
    yield from (ADMM(damping=damping) for damping in (0.001, 0.1, 0.3))
    yield from (ADMM(refine=steps) for steps in (0, 30))


@torch.no_grad()
def gather(model: nn.Module, linears: list[PrunableLinear], windows: list[torch.Tensor]) -> dict[str, InputHessian]:
    """Run windows through the dense model and sum what enters the linears."""
    hessians = {linear.name: InputHessian(linear.weight_OI.shape[1]) for linear in linears}
    hooks = [
        linear.module.register_forward_pre_hook(lambda _, args, name=linear.name: hessians[name].update(args[0]))
        for linear in linears
    ]
    for ids_T in windows:
        model(input_ids=ids_T.unsqueeze(0), use_cache=False)
    for hook in hooks:
        hook.remove()
    return hessians


def held_out_error(
    method: PruningMethod,
    pattern: Pattern,
    linears: list[PrunableLinear],
    seen: dict[str, InputHessian],
    held_out: dict[str, InputHessian],
) -> float:
    """Prune copies of the linears and average their errors on inputs that the method has not seen."""
    errors = []
    for linear in linears:
        dense_OI = linear.weight_OI.detach()
        pruned_OI = dense_OI.clone()
        method.prune(pruned_OI, seen[linear.name], pattern)
        other = held_out[linear.name]
        errors.append(float(other.output_energy(pruned_OI - dense_OI).sum() / other.output_energy(dense_OI).sum()))
    return sum(errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 14, 27])
    parser.add_argument("--linears", nargs="+", default=["q_proj", "o_proj", "gate_proj", "down_proj"])
    parser.add_argument("--windows", type=int, default=32, help="that are calibrated on")
    parser.add_argument("--held-out", type=int, default=16, help="windows that errors are measured on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    module = CausalLM(options.model, dtype="float32")
    module.configure_model()
    model = module.model.eval()
    data = TextDataModule(
        options.calibration,
        tokenizer=module.tokenizer,
        num_samples=options.windows + options.held_out,
        sequence_length=512,
    )
    data.setup()
    windows = [ids_T for batch in data.calibration_dataloader() for ids_T in batch["input_ids"]]
    layers = decoder_layers(model)
    linears = [
        linear
        for number in options.layers
        for linear in layers[number].linears
        if linear.name.rpartition(".")[2] in options.linears
    ]
    seen, held_out = (gather(model, linears, part) for part in (windows[: options.windows], windows[options.windows :]))
    print("| method | " + " | ".join(f"{pattern.sparsity:.0%} {pattern}" for pattern in PATTERNS) + " | seconds |")
    print("| --- |" + " ---: |" * (len(PATTERNS) + 1))
    for method in methods():
        started = time.perf_counter()
        errors = [held_out_error(method, pattern, linears, seen, held_out) for pattern in PATTERNS]
        seconds = time.perf_counter() - started
        print(f"| {method} | " + " | ".join(f"{error:.5f}" for error in errors) + f" | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
