"""Zero-shot answers of ours against lm-eval's own, item by item, on one model.

    python benchmarks/zero_shot.py MODEL TASK ... [--include-path FOLDER] [--limit 200]
    torchrun --nproc-per-node 2 benchmarks/zero_shot.py ...         # the questions split over processes

lm-eval runs its HFLM on the same weights with its simple_evaluate, on the first process. Prints how many
log-likelihoods there were, the largest difference between the two, and both accuracies.
"""

import argparse
import os

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import distributed

from wanda_lightning import CausalLM, evaluate_zero_shot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--include-path")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        distributed.init_process_group("gloo")
    module = CausalLM(options.model, dtype="float32")
    module.configure_model()
    shared = {"limit": options.limit, "batch_size": options.batch_size, "log_samples": True}
    ours = evaluate_zero_shot(
        module.model, module.tokenizer, options.tasks, include_path=options.include_path, **shared
    ).details
    if processes > 1:
        first = distributed.get_rank() == 0
        distributed.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # lm-eval would wait for the others
            os.environ.pop(name)
        if not first:
            return
    theirs = simple_evaluate(
        HFLM(module.model, tokenizer=module.tokenizer, batch_size=options.batch_size, add_bos_token=False),
        tasks=options.tasks,
        num_fewshot=0,
        task_manager=TaskManager(include_path=options.include_path),
        **shared,
    )
    print(f"{processes} process(es)")
    for task in ours["samples"]:
        a, b = (_loglikelihoods(results["samples"][task]) for results in (ours, theirs))
        accuracy = [results["results"][task]["acc,none"] for results in (ours, theirs)]
        questions = len(ours["samples"][task])
        print(
            f"{task}: {len(a)} log-likelihoods of {questions} questions, largest difference {(a - b).abs().max():.2e}; "
            f"accuracy {accuracy[0]:.4f} (ours) {accuracy[1]:.4f} (lm-eval)"
        )


def _loglikelihoods(samples: list[dict]) -> torch.Tensor:
    """Every answer's, in the order of questions and answers."""
    in_order = sorted(samples, key=lambda sample: sample["doc_id"])
    return torch.tensor([float(answer[0][0]) for sample in in_order for answer in sample["resps"]])


if __name__ == "__main__":
    main()
