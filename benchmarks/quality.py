"""Perplexity of a model, dense and pruned by every method at 50 % and 2:4, on two text files; and zero-shot tasks.

    python benchmarks/quality.py MODEL CALIBRATION.txt EVALUATION.txt [--order two one] [--seeds 0 1 2]
        [--tasks TASK ... --include-path FOLDER] [--bfloat16]

Calibration: 32 random windows of 512 tokens of one file, others for each seed; layers are visited in one pass over
them, or in two (``true_sequential``), under autocast with ``--bfloat16``. Perplexity: the first 40 consecutive windows
of the other, float32. Tasks are lm-eval's, accuracy in per cent on their first --limit questions. Prints a Markdown
table: means over the seeds, with standard deviations, and seconds a pruning.
"""

import argparse
import copy
import itertools
import statistics
from collections.abc import Iterable, Sequence

import torch

from wanda_lightning import (
    ADMM,
    RIA,
    Ablate,
    CausalLM,
    Magnitude,
    Reconstruction,
    SparseGPT,
    TextDataModule,
    Unstructured,
    Wanda,
    prune_model,
)
from wanda_lightning.engine.settings import PruningSettings
from wanda_lightning.evaluation import Perplexity, evaluate_zero_shot, load_tasks
from wanda_lightning.sparsity import Pattern, parse_pattern

METHODS = {
    "magnitude": Magnitude(),
    "Wanda": Wanda(),
    "RIA": RIA(),
    "Wanda variant": Wanda(variant=True),
    "SparseGPT": SparseGPT(),
    "Ablate (Wanda, sequential)": Ablate("wanda", "sequential"),
    "Ablate (Wanda, iterative)": Ablate("wanda", "iterative"),
    "Ablate (magnitude, sequential)": Ablate("magnitude", "sequential"),
    "Ablate (magnitude, iterative)": Ablate("magnitude", "iterative"),
    "SparseGPT, refined": SparseGPT(refine=20),
    "ADMM": ADMM(),
    "SparseGPT, shrinkage": SparseGPT(shrinkage=0.3),
    "Wanda, permuted": Wanda(),
    "SparseGPT, permuted": SparseGPT(),
    "ADMM, permuted": ADMM(),
    "SparseGPT, dense target (balanced)": SparseGPT(shrinkage=0.3),
    "ADMM, dense target (best)": ADMM(damping=0.3),
    "SparseGPT, dense target, permuted": SparseGPT(shrinkage=0.3),
    "SparseGPT, dense target, reconstruction": SparseGPT(shrinkage=0.3),
}
DENSE_TARGET = {"dense_target": True}
SETTINGS = {  # as in the recipes
    **{name: {"permute": True} for name in ("Wanda, permuted", "SparseGPT, permuted", "ADMM, permuted")},
    "SparseGPT, dense target (balanced)": DENSE_TARGET,
    "ADMM, dense target (best)": DENSE_TARGET,
    "SparseGPT, dense target, permuted": {**DENSE_TARGET, "permute": True},
    "SparseGPT, dense target, reconstruction": {**DENSE_TARGET, "reconstruction": Reconstruction(epochs=8, lr=1e-3)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"], help="a sparsity, or n:m")
    parser.add_argument("--order", nargs="+", choices=["two", "one"], default=["one"], help="how many passes a layer")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="run the model under autocast while it is pruned")
    parser.add_argument("--batch-size", type=int, default=4, help="calibration windows a batch")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--evaluation-windows", type=int, default=40)
    parser.add_argument("--tasks", nargs="*", default=[], help="of lm-eval")
    parser.add_argument("--include-path", help="folder of task YAMLs")
    parser.add_argument("--limit", type=int, help="questions a task")
    options = parser.parse_args()

    sizes = {"num_samples": options.num_samples, "calibration_batch_size": options.batch_size}
    module, data = model_and_data(options, max_evaluation_windows=options.evaluation_windows, **sizes)
    model = module.model
    tasks = load_tasks(options.tasks, options.include_path) if options.tasks else None
    names = list(tasks.questions()) if tasks else []

    def results(of: torch.nn.Module) -> list[float]:
        accuracies = []
        if tasks:
            metrics = evaluate_zero_shot(of, module.tokenizer, tasks, limit=options.limit, batch_size=16).metrics
            accuracies = [100 * metrics[f"{name}/acc"] for name in names]
        return [perplexity(of, data[0]), *accuracies]

    def pruned_results(name: str, pattern: Pattern, one_pass: bool, seed: TextDataModule) -> list[float]:
        pruned, settings = copy.deepcopy(model), {"true_sequential": one_pass, **SETTINGS.get(name, {})}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=options.bfloat16):
            report = prune_model(pruned, seed.calibration_dataloader(), METHODS[name], pattern, **settings)
        return [*results(pruned), report.seconds]

    print("| " + " | ".join(["method", "pattern", "passes", "perplexity", *names, "seconds"]) + " |")
    print("| --- | --- | --- |" + " ---: |" * (len(names) + 2))
    print(f"| dense | | | {' | '.join(map(with_spread, zip(results(model), strict=True)))} | |", flush=True)
    for name, setting, order in itertools.product(options.methods, options.patterns, options.order):
        method, pattern = METHODS[name], parse_pattern(setting) if ":" in setting else Unstructured(float(setting))
        if (method.statistic is None and order != options.order[0]) or not takes(name, pattern):
            continue  # magnitude has no passes
        seeds = data if method.statistic else data[:1]
        found = [pruned_results(name, pattern, order == "one", seed) for seed in seeds]
        cells = [name, setting, order if method.statistic else "", *map(with_spread, zip(*found, strict=True))]
        print(f"| {' | '.join(cells)} |", flush=True)


def model_and_data(options: argparse.Namespace, **settings: int) -> tuple[CausalLM, list[TextDataModule]]:
    """Load the model that the options name, dense, and its texts, once for each seed of the calibration windows."""
    module = CausalLM(options.model, dtype="float32")
    module.configure_model()
    module.model.eval().to(options.device)
    settings = {"num_samples": 32, "sequence_length": 512, "calibration_batch_size": 4, **settings}
    data = [
        TextDataModule(options.calibration, options.evaluation, tokenizer=module.tokenizer, seed=seed, **settings)
        for seed in options.seeds
    ]
    for each in data:
        each.setup()
    return module, data


def with_spread(values: Sequence[float]) -> str:
    """Write the mean of some values, and their standard deviation if there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def takes(name: str, pattern: Pattern) -> bool:
    try:
        PruningSettings(method=METHODS[name], pattern=pattern, **SETTINGS.get(name, {}))
    except ValueError:
        return False
    return True


def perplexity(model: torch.nn.Module, data: TextDataModule) -> float:
    return perplexity_of(model, data.val_dataloader())


@torch.no_grad()
def perplexity_of(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    metric = Perplexity().to(model.device)
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        metric.update_from(model, {"input_ids": ids}, ids)
    return metric.compute().item()


if __name__ == "__main__":
    main()
