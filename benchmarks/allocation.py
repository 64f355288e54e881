"""Perplexity of a model whose sparsity is split among its layers in several ways.

    python benchmarks/allocation.py MODEL CALIBRATION.txt EVALUATION.txt [--sparsities 0.6 0.7]
        [--methods Wanda "SparseGPT, dense target (balanced)"] [--allocations uniform OWL ATP LeastLoss]
        [--seeds 0 1 2] [--order one]

Calibration: 32 random windows of 512 tokens of one file, others for each seed; allocations choose on these windows
alone. Perplexity: the first 40 consecutive windows of the other, float32. Prints a Markdown table: means over the
seeds, with standard deviations; seconds of a pruning, and of those the allocation's.
"""

import argparse
import copy
import itertools
import json
from pathlib import Path

from quality import METHODS, SETTINGS, model_and_data, perplexity, with_spread

from wanda_lightning import ATP, OWL, LeastLoss, prune_model

ALLOCATIONS = {
    "uniform": None,
    "OWL": OWL(),
    "ATP": ATP(),
    "LeastLoss": LeastLoss(),
    "LeastLoss, all": LeastLoss(reach=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.6, 0.7])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["Wanda"])
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows")
    parser.add_argument("--order", choices=["two", "one"], default="one", help="how many passes a layer")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--evaluation-windows", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reports", type=Path, help="folder for the report of every pruning")
    options = parser.parse_args()

    module, data = model_and_data(
        options, num_samples=options.num_samples, max_evaluation_windows=options.evaluation_windows
    )
    model = module.model

    print("| method | sparsity | allocation | perplexity | zeros | seconds | of the allocation |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for method, sparsity, name in itertools.product(options.methods, options.sparsities, options.allocations):
        found = []
        for seed, each in zip(options.seeds, data, strict=True):
            pruned = copy.deepcopy(model)
            report = prune_model(
                pruned,
                each.calibration_dataloader(),
                METHODS[method],
                sparsity,
                allocation=ALLOCATIONS[name],
                true_sequential=options.order == "one",
                **SETTINGS.get(method, {}),
            )
            if options.reports:
                file = options.reports / f"{method}-{sparsity}-{name}-{seed}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(report.to_dict(), indent=2))
            seconds = report.seconds_by_phase.get("allocation", 0.0)
            found.append([perplexity(pruned, data[0]), 100 * report.sparsity, report.seconds, seconds])
        cells = map(with_spread, zip(*found, strict=True))
        print(f"| {method} | {sparsity} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
