"""Perplexity of a model whose MLPs lost neurons, by every choice of neurons, with and without the refit.

    python benchmarks/width.py MODEL CALIBRATION.txt EVALUATION.txt [--keep 0.8] [--seeds 0 1 2] [--damping 0.1]

Calibration: 32 random windows of 512 tokens of one file, others for each seed. Perplexity: the first 40 consecutive
windows of the other, float32. Prints a Markdown table: means over the seeds, with standard deviations, the parameters
that are left, and seconds a pruning.
"""

import argparse
import copy
import itertools
import time

from quality import model_and_data, perplexity, with_spread

from wanda_lightning.engine.width import prune_width

CHOICES = ("obs", "wanda", "magnitude")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8], help="fractions of the neurons that stay")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--refit", nargs="+", choices=["yes", "no"], default=["yes", "no"])
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--evaluation-windows", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    module, data = model_and_data(
        options, num_samples=options.num_samples, max_evaluation_windows=options.evaluation_windows
    )
    model = module.model

    print("| choice | refit | width | parameters | perplexity | seconds |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"| dense | | | {parameters:,} | {perplexity(model, data[0]):.2f} | |", flush=True)
    for keep, choice, refit in itertools.product(options.keep, options.choices, options.refit):
        found, report = [], None
        seeds = data if refit == "yes" or choice != "magnitude" else data[:1]
        for seed in seeds:
            smaller = copy.deepcopy(model)
            started = time.perf_counter()
            report = prune_width(
                smaller,
                seed.calibration_dataloader(),
                keep,
                choice=choice,
                refit=refit == "yes",
                damping=options.damping,
            )
            seconds = time.perf_counter() - started
            found.append((perplexity(smaller, data[0]), seconds))
        assert report is not None
        figures = " | ".join(map(with_spread, zip(*found, strict=True)))
        print(f"| {choice} | {refit} | {report.title} | {report.parameters[1]:,} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
