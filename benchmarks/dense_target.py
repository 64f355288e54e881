"""What ``dense_target`` brings: the error of the hidden states behind the first layers, on windows not calibrated on.

    python benchmarks/dense_target.py MODEL CALIBRATION.txt [--layers 8] [--windows 16] [--fresh 4]

Windows of 512 tokens of the calibration text, seed 0. The first layers are pruned, without and with ``dense_target``,
and the hidden states behind them are compared with the dense model's: the sum of squared differences over the sum of
squares, on the windows that calibrated and on fresh ones. No evaluation text is looked at.
"""

import argparse
import copy
import time

import torch
from torch import Tensor, nn

from wanda_lightning import CausalLM, TextDataModule, prune_model
from wanda_lightning.calibration.calibrated_layer import hidden_states_of
from wanda_lightning.model.decoder import decoder_layers


@torch.no_grad()
def behind_the_last_layer(model: nn.Module, windows: list[Tensor]) -> Tensor:
    """Return the hidden states of all tokens, shape (tokens, hidden size)."""
    states: list[Tensor] = []
    layer = decoder_layers(model)[-1].module
    hook = layer.register_forward_hook(lambda _, __, out: states.append(hidden_states_of(out).flatten(0, -2)))
    for ids_BT in windows:
        model(input_ids=ids_BT, use_cache=False)
    hook.remove()
    return torch.cat(states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--layers", type=int, default=8, help="the first so many of the model")
    parser.add_argument("--windows", type=int, default=16, help="that are calibrated on")
    parser.add_argument("--fresh", type=int, default=4, help="windows that are not")
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "admm"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    module = CausalLM(options.model, dtype="float32")
    module.configure_model()
    model = module.model.eval()
    layers = model.get_submodule(decoder_layers(model)[0].name.rpartition(".")[0])
    del layers[options.layers :]
    samples = options.windows + options.fresh
    data = TextDataModule(
        options.calibration, tokenizer=module.tokenizer, num_samples=samples, sequence_length=512, batch_size=1
    )
    data.setup()
    windows = [batch["input_ids"] for batch in data.calibration_dataloader()]
    parts = windows[: options.windows], windows[options.windows :]
    dense = [behind_the_last_layer(model, part) for part in parts]
    print("| method | pattern | dense_target | calibration windows | fresh windows | mean share | seconds |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for pattern in options.patterns:
        for method in options.methods:
            for dense_target in (False, True):
                pruned, started = copy.deepcopy(model), time.perf_counter()
                wanted = pattern if ":" in pattern else float(pattern)
                report = prune_model(pruned, parts[0], method, wanted, true_sequential=True, dense_target=dense_target)
                seconds = time.perf_counter() - started
                errors = [
                    float((behind_the_last_layer(pruned, part) - states).square().sum() / states.square().sum())
                    for part, states in zip(parts, dense, strict=True)
                ]
                shares = [row.dense_target or 0 for row in report.linears]
                print(
                    f"| {report.method} | {pattern} | {'on' if dense_target else 'off'} | {errors[0]:.4f} | "
                    f"{errors[1]:.4f} | {sum(shares) / len(shares):.2f} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
