"""Peak memory and time of pruning from disk, layer by layer, against pruning in memory.

    python benchmarks/streaming.py [--layers 4 32] [--hidden 1024] [--processes 1 2] [--cap 2600]

Random LLaMA-shaped models of one width and several depths are written in shards, layer by layer, so that making them
takes no memory; each run is a process of its own, and its peak is the largest resident set that the kernel saw
(``ru_maxrss``). A run under ``--cap`` MiB (``RLIMIT_DATA``, as ``prlimit --data`` sets it) shows what fits; it counts
mapped files too, so a model that is stored in bfloat16 and pruned in float32 (``--stored bfloat16``) tells more. Prints
Markdown tables.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = ("Wanda", "SparseGPT")
PLACES = ("in memory", "device", "cpu", "disk")
VOCABULARY = 1000
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--length", type=int, default=128, help="of a window, in tokens")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="that share the calibration windows")
    parser.add_argument("--cap", type=int, help="MiB of private memory, for two more runs")
    parser.add_argument("--stored", choices=("float32", "bfloat16"), default="float32", help="as; all runs are float32")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # what a process of its own is to do, as JSON
    options = parser.parse_args()
    if options.job:
        found = run(**json.loads(options.job))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = {
            layers: write_model(Path(folder) / f"{layers}", layers, options.hidden, options.stored)
            for layers in options.layers
        }
        last = models[options.layers[-1]]
        shape = {"windows": options.windows, "length": options.length}
        print(
            "| layers | processes | method | activations | MiB to start with | peak, pruned | peak, saved | seconds |"
        )
        print("| ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |")
        runs = itertools.product(models.items(), options.processes, options.methods, options.places)
        for (layers, model), processes, method, place in runs:
            found = in_a_process(processes=processes, model=str(model), method=method, place=place, **shape)
            numbers = " | ".join(f"{found[each]:.0f}" for each in ("start", "pruned", "saved", "seconds"))
            where = place if place == "in memory" else f"streamed, {place}"
            print(f"| {layers} | {processes} | {method} | {where} | {numbers} |", flush=True)
        if options.cap:
            print(f"\nUnder a cap of {options.cap} MiB, {options.layers[-1]} layers:")
            for place in ("in memory", "cpu"):
                found = in_a_process(options.cap, model=str(last), method=options.methods[-1], place=place, **shape)
                print(f"- {place}: {found.get('error') or 'passes'}", flush=True)


def in_a_process(cap: int | None = None, processes: int = 1, **what: object) -> dict:
    limit = ["prlimit", f"--data={cap * MIB}"] if cap else []
    many = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [*limit, sys.executable, *many, __file__, "--job", json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run(model: str, method: str, place: str, windows: int, length: int) -> dict[str, float]:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 (so that its code is there to start with)

    import wanda_lightning
    from wanda_lightning.checkpoints.loading import load_model, load_streamed
    from wanda_lightning.checkpoints.saving import save_pretrained
    from wanda_lightning.engine.journal import Journal
    from wanda_lightning.engine.processes import Processes

    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    processes = Processes()
    ids = torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(0))
    start, started = peak(), time.perf_counter()
    streamed = place != "in memory"
    folder = f"{model}-{method}-{place}-{processes.size}"  # the same in all processes
    try:
        loaded = load_streamed(model, "float32") if streamed else load_model(model, "float32")
        wanda_lightning.prune_model(
            loaded,
            ids.split(1)[processes.rank :: processes.size],
            getattr(wanda_lightning, method)(),
            wanda_lightning.Unstructured(0.5),
            activations=place if streamed else "device",
            journal=Journal(Path(folder) / "unfinished") if streamed else None,
            processes=processes,
        )
        pruned = peak()
        if processes.rank == 0:
            save_pretrained(loaded, None, Path(folder) / "model")
        found = {"start": start, "pruned": pruned, "saved": peak(), "seconds": time.perf_counter() - started}
        return {name: max(each[name] for each in processes.gather(found)) for name in found}  # of any process
    finally:
        if processes.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_model(folder: Path, layers: int, hidden: int, stored: str) -> Path:
    """Write a random model of LLaMA's proportions, one file a layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        dtype=stored,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, names in files.items():
        tensors = {
            name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
            for name, shape in names.items()
        }
        tensors = {name: tensor.to(getattr(torch, stored)) for name, tensor in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


if __name__ == "__main__":
    main()
