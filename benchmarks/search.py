"""The search for a budget against a fine sweep: what both find on the same held-out windows, and how long they take.

    python benchmarks/search.py MODEL CALIBRATION.txt EVALUATION.txt [--increase 0.05] [--most 0.5]

Wanda, in one pass. The search is the whole command: trials, the model that it makes, both evaluated, saved. The sweep
prunes to 1 %, 2 %, ... --most, each time from the dense weights, and evaluates on the held-out windows alone. Prints a
Markdown table.
"""

import argparse
import copy
import tempfile
import time

from quality import perplexity_of

from wanda_lightning import CausalLM, PruningTrainer, TextDataModule, WandaPruning, prune_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--increase", type=float, default=0.05, help="of perplexity, as a fraction")
    parser.add_argument("--most", type=float, default=0.5, help="sparsity at which the sweep ends")
    parser.add_argument("--num-samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16, help="held-out windows, and evaluation windows at the end")
    options = parser.parse_args()

    def loaded() -> tuple[CausalLM, TextDataModule]:
        module = CausalLM(options.model, dtype="float32")
        module.configure_model()
        data = TextDataModule(
            options.calibration,
            options.evaluation,
            tokenizer=module.tokenizer,
            num_samples=options.num_samples,
            sequence_length=options.sequence_length,
            max_evaluation_windows=options.windows,
        )
        data.setup()
        return module, data

    module, data = loaded()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = PruningTrainer(callbacks=[WandaPruning()], default_root_dir=folder, accelerator="cpu", **quiet)
        started = time.perf_counter()
        result = trainer.search(
            module, data, max_perplexity_increase=options.increase, held_out_windows=options.windows
        )
        search_seconds = time.perf_counter() - started

    module, data = loaded()
    model, held_out = module.model.eval(), data.held_out_dataloader(options.windows)
    started = time.perf_counter()
    allowed = (1 + options.increase) * perplexity_of(model, held_out)
    found = 0
    for percent in range(1, round(100 * options.most) + 1):
        pruned = copy.deepcopy(model)
        prune_model(pruned, data.calibration_dataloader(), "wanda", percent / 100)
        if perplexity_of(pruned, held_out) <= allowed:
            found = percent
    sweep_seconds = time.perf_counter() - started

    print("| | prunings | sparsity found | seconds | / sweep |\n| --- | ---: | ---: | ---: | ---: |")
    for name, prunings, sparsity, seconds in (
        ("search", len(result.trials) + 1, result.found, search_seconds),
        ("sweep", round(100 * options.most), found / 100, sweep_seconds),
    ):
        print(f"| {name} | {prunings} | {sparsity:.2f} | {seconds:.0f} | {seconds / sweep_seconds:.2f} |")


if __name__ == "__main__":
    main()
