"""Perplexity of a model, dense and pruned by every method at 50 % and 2:4, on two text files; and zero-shot tasks.

    python benchmarks/quality.py MODEL CALIBRATION.txt EVALUATION.txt [--tasks TASK ... --include-path FOLDER]

Calibration: 32 random windows of 512 tokens of one file, seed 0. Perplexity: the first 40 consecutive windows of the
other, float32. Tasks are lm-eval's, accuracy in per cent on their first --limit questions. Prints
a Markdown table, and seconds a pruning.
"""

import argparse
import copy

import torch

from wanda_lightning import (
    Ablate,
    CausalLM,
    Magnitude,
    SemiStructured,
    SparseGPT,
    TextDataModule,
    Unstructured,
    Wanda,
    prune_model,
)
from wanda_lightning.evaluation import Perplexity, evaluate_zero_shot, load_tasks

METHODS = {
    "magnitude": Magnitude(),
    "Wanda": Wanda(),
    "Wanda variant": Wanda(variant=True),
    "SparseGPT": SparseGPT(),
    "Ablate (Wanda, sequential)": Ablate("wanda", "sequential"),
    "Ablate (Wanda, iterative)": Ablate("wanda", "iterative"),
    "Ablate (magnitude, sequential)": Ablate("magnitude", "sequential"),
    "Ablate (magnitude, iterative)": Ablate("magnitude", "iterative"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"], help="a sparsity, or n:m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=4, help="calibration windows a batch")
    parser.add_argument("--tasks", nargs="*", default=[], help="of lm-eval")
    parser.add_argument("--include-path", help="folder of task YAMLs")
    parser.add_argument("--limit", type=int, help="questions a task")
    options = parser.parse_args()

    module = CausalLM(options.model, dtype="float32")
    module.configure_model()
    model = module.model.eval().to(options.device)
    data = TextDataModule(
        options.calibration,
        options.evaluation,
        tokenizer=module.tokenizer,
        num_samples=32,
        sequence_length=512,
        calibration_batch_size=options.batch_size,
        max_evaluation_windows=40,
    )
    data.setup()
    tasks = load_tasks(options.tasks, options.include_path) if options.tasks else None
    names = list(tasks.questions()) if tasks else []

    def results(of: torch.nn.Module) -> str:
        cells = [f"{perplexity(of, data):.2f}"]
        if tasks:
            metrics = evaluate_zero_shot(of, module.tokenizer, tasks, limit=options.limit, batch_size=16).metrics
            cells += [f"{100 * metrics[f'{name}/acc']:.1f}" for name in names]
        return " | ".join(cells)

    print("| " + " | ".join(["method", "pattern", "perplexity", *names, "seconds"]) + " |")
    print("| --- | --- |" + " ---: |" * (len(names) + 2))
    print(f"| dense | | {results(model)} | |", flush=True)
    for name in options.methods:
        for setting in options.patterns:
            kept, _, size = setting.partition(":")
            pattern = SemiStructured(int(kept), int(size)) if size else Unstructured(float(setting))
            try:
                METHODS[name].check(pattern)
            except ValueError:
                continue
            pruned = copy.deepcopy(model)
            report = prune_model(pruned, data.calibration_dataloader(), METHODS[name], pattern)
            print(f"| {name} | {setting} | {results(pruned)} | {report.seconds:.1f} |", flush=True)


@torch.no_grad()
def perplexity(model: torch.nn.Module, data: TextDataModule) -> float:
    metric = Perplexity().to(model.device)
    for batch in data.val_dataloader():
        ids = batch["input_ids"].to(model.device)
        metric.update(model(ids, use_cache=False).logits, ids)
    return metric.compute().item()


if __name__ == "__main__":
    main()
