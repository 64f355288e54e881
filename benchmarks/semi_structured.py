"""Linears of LLaMA's shapes: torch's 2:4 sparse kernels against dense ones, from one token to thousands; needs CUDA.

    python benchmarks/semi_structured.py --dtype bfloat16 --tokens 1 16 256 4096

Weights are pruned to 2:4 by magnitude and converted by ``to_semi_structured``, so what is timed is what users get. A
ratio over 1 means that the sparse kernel is faster. Times are medians; both outputs are compared. Prints a Markdown
table.
"""

import argparse
import sys

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from wanda_lightning import Magnitude, SemiStructured, to_semi_structured

# Linears by the model that has them: (out features, in features).
SHAPES = {
    "7B q_proj": (4096, 4096),
    "7B up_proj": (11008, 4096),
    "7B down_proj": (4096, 11008),
    "70B q_proj": (8192, 8192),
    "70B up_proj": (28672, 8192),
    "70B down_proj": (8192, 28672),
}


class Layer(nn.Module):
    """One linear, as a decoder layer that ``to_semi_structured`` finds."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device="cuda")
        Magnitude().prune(linear.weight.detach(), None, SemiStructured(2, 4))
        self.layers = nn.ModuleList([nn.ModuleDict({"linear": linear})])

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.layers[0]["linear"](x_TI)  # type: ignore[index]


def median_ms(layer: Layer, x_TI: Tensor) -> float:
    return Timer("layer(x)", globals={"layer": layer, "x": x_TI}).blocked_autorange(min_run_time=0.5).median * 1e3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 256, 1024, 4096])
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE", help=f"{[*SHAPES]}"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU of compute capability 8.0 or newer, and torch finds none here")
    dtype = getattr(torch, options.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}\n")
    print("| linear | out x in | tokens | dense ms | 2:4 ms | dense / 2:4 | difference |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in options.shapes:
        rows, columns = SHAPES[name]
        layer = Layer((rows, columns), dtype)
        inputs = [torch.randn(tokens, columns, dtype=dtype, device="cuda") for tokens in options.tokens]
        dense = [(median_ms(layer, x_TI), layer(x_TI)) for x_TI in inputs]
        to_semi_structured(layer)
        for x_TI, (before, expected_TO) in zip(inputs, dense, strict=True):
            after = median_ms(layer, x_TI)
            difference = float((layer(x_TI) - expected_TO).float().norm() / expected_TO.float().norm())
            print(
                f"| {name} | {rows} x {columns} | {len(x_TI)} | {before:.3f} | {after:.3f} | {before / after:.2f} "
                f"| {difference:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
