"""The solver against a plain transcription of SparseGPT (arXiv:2301.00774, algorithm 1) over one SmolLM2-135M layer.

    python benchmarks/solver.py                 # 2 threads on the CPU
    python benchmarks/solver.py --device cuda

Both get the same weights and the same Hessians. The plain one works column by column on row-major weights and finds
the factor of the inverse in three steps, for each of the seven linears. Ours is ``SparseGPT.prune`` as users call it:
linears with the same inputs share a Hessian and its factor. Runs alternate; the best of ``--repeat`` counts.

Shapes: O out features, I in features, B columns of a block.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from wanda_lightning.methods import SparseGPT
from wanda_lightning.solvers import prune_with_mask
from wanda_lightning.sparsity import Pattern, SemiStructured, parse_pattern
from wanda_lightning.statistics import InputHessian

BLOCK, DAMPING = 128, 0.01
# Linears of a layer by the tensor that feeds them: (name, out features), and how many features it has.
LAYER = {
    "attention input": (576, (("q_proj", 576), ("k_proj", 192), ("v_proj", 192))),
    "attention output": (576, (("o_proj", 576),)),
    "mlp input": (576, (("gate_proj", 1536), ("up_proj", 1536))),
    "mlp hidden": (1536, (("down_proj", 576),)),
}


def plain_sparsegpt(weight_OI: Tensor, hessian_II: Tensor, pattern: Pattern, pruned_OI: Tensor | None = None) -> Tensor:
    """Transcribe the published loop; returns the pruned weight. ``pruned_OI`` fixes the mask."""
    w_OI, h_II = weight_OI.float().clone(), hessian_II.clone()
    columns = w_OI.shape[1]
    h_II.diagonal().add_(DAMPING * h_II.diagonal().mean())
    u_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h_II)), upper=True)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        w_OB, u_BB = w_OI[:, start:stop].clone(), u_II[start:stop, start:stop]
        error_OB = torch.zeros_like(w_OB)
        group = pattern.m if isinstance(pattern, SemiStructured) else 0
        if pruned_OI is not None:
            gone_OB = pruned_OI[:, start:stop]
        elif group:
            gone_OB = torch.zeros_like(w_OB, dtype=torch.bool)
        else:
            score_OB = w_OB.square() / u_BB.diagonal().square()
            count = int(pattern.sparsity * score_OB.numel())
            gone_OB = score_OB < score_OB.flatten().sort().values[count]
        for j in range(stop - start):
            if group and pruned_OI is None and j % group == 0:
                near = slice(j, j + group)
                score_OG = w_OB[:, near].square() / u_BB.diagonal()[near].square()
                gone_OB.scatter_(1, j + score_OG.topk(group - pattern.n, dim=1, largest=False).indices, True)
            kept_O = w_OB[:, j].clone()
            kept_O[gone_OB[:, j]] = 0
            error_O = (w_OB[:, j] - kept_O) / u_BB[j, j]
            w_OB[:, j:] -= error_O.unsqueeze(1).matmul(u_BB[j, j:].unsqueeze(0))
            w_OB[:, j] = kept_O
            error_OB[:, j] = error_O
        w_OI[:, start:stop] = w_OB
        w_OI[:, stop:] -= error_OB @ u_II[start:stop, stop:]
    return w_OI


def make_layer(device: torch.device) -> list[tuple[InputHessian, list[tuple[str, Tensor]]]]:
    """Random weights, and Hessians of correlated inputs with a few strong features, as models have them."""
    generator = torch.Generator().manual_seed(0)
    layer = []
    for features, linears in LAYER.values():
        mixing_II = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
        strength_I = torch.randn(features, generator=generator).exp()
        hessian = InputHessian(features, device)
        for _ in range(4):
            x_TI = torch.randn(2048, features, generator=generator) @ mixing_II * strength_I
            hessian.update(x_TI.to(device))
        weights = [(name, torch.randn(rows, features, generator=generator).to(device)) for name, rows in linears]
        layer.append((hessian, weights))
    return layer


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.no_grad()
def compare(pattern: Pattern, device: torch.device, repeat: int) -> None:
    """Time both solvers and print a row for every linear and one for the layer."""
    method = SparseGPT(BLOCK, DAMPING)
    layer = make_layer(device)
    names = [name for _, linears in layer for name, _ in linears]
    ours, plain = ({name: float("inf") for name in names} for _ in range(2))
    differences = {}
    for _ in range(repeat):
        for hessian, linears in layer:
            fresh = InputHessian(hessian.in_features, device)  # has no factor yet: the first linear pays for it
            fresh.merge(hessian)
            hessian_II = fresh.compute()
            for name, weight_OI in linears:
                pruned_OI = weight_OI.clone()
                seconds = timed(lambda: method.prune(pruned_OI, fresh, pattern), device)  # noqa: B023
                ours[name] = min(ours[name], seconds)
                seconds = timed(lambda: plain_sparsegpt(weight_OI, hessian_II, pattern), device)  # noqa: B023
                plain[name] = min(plain[name], seconds)
    for hessian, linears in layer:
        for name, weight_OI in linears:
            given_OI = weight_OI.clone()
            mask_OI = method.prune(weight_OI.clone(), hessian, pattern)
            prune_with_mask(given_OI, hessian.factor(DAMPING), mask_OI, BLOCK)
            expected_OI = plain_sparsegpt(weight_OI, hessian.compute(), pattern, ~mask_OI)
            differences[name] = float((given_OI - expected_OI).abs().max() / expected_OI.abs().max())
    print(f"\n{'pattern ' + str(pattern):18}{'plain ms':>10}{'ours ms':>10}{'ratio':>8}{'largest difference':>20}")
    for name in names:
        ratio = plain[name] / ours[name]
        print(f"{name:18}{plain[name] * 1e3:10.1f}{ours[name] * 1e3:10.1f}{ratio:8.1f}{differences[name]:20.1e}")
    total_plain, total_ours = sum(plain.values()), sum(ours.values())
    ratio = total_plain / total_ours
    print(f"{'layer':18}{total_plain * 1e3:10.1f}{total_ours * 1e3:10.1f}{ratio:8.1f}{max(differences.values()):20.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeat", default=5, type=int)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--patterns", default=["unstructured", "2:4"], nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, best of {arguments.repeat}"
    )
    for pattern in map(parse_pattern, arguments.patterns):
        compare(pattern, arguments.device, arguments.repeat)


if __name__ == "__main__":
    main()
