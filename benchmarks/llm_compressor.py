"""Our prunings beside those of llm-compressor: the same model, windows and batches; perplexity and seconds.

    pip install llmcompressor==0.14.0.1      # in an environment of its own, which has this package, too
    python benchmarks/llm_compressor.py MODEL CALIBRATION.txt EVALUATION.txt [--patterns 0.5 2:4] [--repeat 3]

Calibration on 32 random windows of 512 tokens, four a batch; perplexity on the first 40 windows of the other file. Both
tools prune all linears but lm_head, in turns, in one process; seconds are medians, without the evaluation. Prints a
Markdown table.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable

from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from quality import model_and_data, perplexity
from torch import nn

from wanda_lightning import TextDataModule, prune_model

MODIFIERS = {"Wanda": WandaPruningModifier, "SparseGPT": SparseGPTModifier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--methods", nargs="+", choices=MODIFIERS, default=list(MODIFIERS))
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"], help="a sparsity, or n:m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=4, help="calibration windows a batch")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--evaluation-windows", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    options.seeds = [0]
    logger.remove()  # a line for every linear

    sizes = {"num_samples": options.num_samples, "calibration_batch_size": options.batch_size}
    module, [data] = model_and_data(options, max_evaluation_windows=options.evaluation_windows, **sizes)
    tools: dict[str, Callable[[nn.Module, TextDataModule, str, str], None]] = {"llm-compressor": theirs, "ours": ours}
    seconds: dict[tuple[str, str, str], list[float]] = {}
    found: dict[tuple[str, str, str], float] = {}
    cases = list(itertools.product(options.methods, options.patterns, tools))
    for _, case in itertools.product(range(options.repeat), cases):
        method, pattern, tool = case
        pruned = copy.deepcopy(module.model)
        started = time.perf_counter()
        tools[tool](pruned, data, method, pattern)
        seconds.setdefault(case, []).append(time.perf_counter() - started)
        if case not in found:
            found[case] = perplexity(pruned, data)
        print(f"{' '.join(case)}: {found[case]:.2f}, {seconds[case][-1]:.1f} s", flush=True)

    print("\n| method | pattern | tool | perplexity | seconds | / llm-compressor |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    print(f"| dense | | | {perplexity(module.model, data):.2f} | | |")
    for method, pattern, tool in cases:
        own, base = (statistics.median(seconds[method, pattern, each]) for each in (tool, "llm-compressor"))
        print(f"| {method} | {pattern} | {tool} | {found[method, pattern, tool]:.2f} | {own:.1f} | {own / base:.2f} |")


def ours(model: nn.Module, data: TextDataModule, method: str, pattern: str) -> None:
    prune_model(model, data.calibration_dataloader(), method.lower(), pattern if ":" in pattern else float(pattern))


def theirs(model: nn.Module, data: TextDataModule, method: str, pattern: str) -> None:
    asked = {"mask_structure": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    modifier = MODIFIERS[method](**{"sparsity": 0.5, **asked}, targets=["Linear"], ignore=["re:.*lm_head"])
    oneshot(model=model, dataset=data.calibration_dataloader(), recipe=[modifier])


if __name__ == "__main__":
    main()
