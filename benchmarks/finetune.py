"""What masks cost: seconds of a training step that keeps zeros, and their ratio to the same step without.

    python benchmarks/finetune.py MODEL [--batch-size 2] [--sequence-length 256] [--steps 12] [--device cuda]

One model, pruned by magnitude at 50 %, one AdamW. Steps with masks and without take turns, so that both see the same
machine; a step is zero_grad, forward, backward and the optimizer's step. Prints a Markdown table with the best of each
(whatever else runs on a machine only adds), their ratio, what the masks take of a step by themselves, and their memory.
"""

import argparse
import time

import torch

from wanda_lightning import CausalLM, Magnitude, Unstructured, prune_model
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.training.masks import WeightMasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help="of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    torch.manual_seed(0)
    module = CausalLM(options.model, dtype=options.dtype)
    module.configure_model()
    model = module.model.to(options.device)
    prune_model(model, None, Magnitude(), Unstructured(0.5))
    linears = [linear for layer in decoder_layers(model) for linear in layer.linears]
    masks = WeightMasks({linear.parameter_name: linear.weight for linear in linears})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    shape = options.batch_size, options.sequence_length
    ids = torch.randint(0, model.config.vocab_size, shape, device=options.device)

    def clock() -> float:
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(masked: bool) -> tuple[float, float]:
        started, on_masks = clock(), 0.0
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if masked:
            before = clock()
            masks.mask_gradients()
            on_masks += clock() - before
        optimizer.step()
        if masked:
            before = clock()
            masks.mask_weights()
            on_masks += clock() - before
        return clock() - started, on_masks

    step(masked=True)
    plain, kept, alone = [], [], []
    for _ in range(options.steps):
        plain.append(step(masked=False)[0])
        seconds, on_masks = step(masked=True)
        kept.append(seconds)
        alone.append(on_masks)
    masks.check()
    size = sum(mask.untyped_storage().nbytes() for _, _, mask in masks.masks)
    weights = sum(weight.numel() for _, weight, _ in masks.masks)
    a, b, c = (min(seconds) for seconds in (plain, kept, alone))
    print("| step without masks, s | with masks, s | ratio | masks alone, share of a step | bytes a masked weight |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    print(f"| {a:.3f} | {b:.3f} | {b / a:.3f} | {c / a:.2%} | {size / weights:.2f} |")


if __name__ == "__main__":
    main()
