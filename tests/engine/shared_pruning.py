"""Prune with every method, with the calibration batches shared by several processes. Run by test_processes.py."""

import sys
from pathlib import Path

import torch
from helpers import Forked, tiny_llama, tiny_mixtral, token_batches
from torch import distributed, multiprocessing

from wanda_lightning import OWL, LeastLoss
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.methods import Ablate, Magnitude, SparseGPT, Wanda
from wanda_lightning.sparsity import SemiStructured, Unstructured

METHODS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "variant": Wanda(variant=True),
    "sparsegpt": SparseGPT(block_size=16),
    **{f"{a}-{b}": Ablate(a, b, block_size=16) for a in ("wanda", "magnitude") for b in ("sequential", "iterative")},
}
RUNS = {
    **{name: (method, Unstructured(0.5)) for name, method in METHODS.items()},
    **{f"{name} 2:4": (METHODS[name], SemiStructured(2, 4)) for name in ("wanda", "sparsegpt", "wanda-iterative")},
    **{f"{name}, one pass": (METHODS[name], Unstructured(0.5)) for name in ("wanda", "sparsegpt")},
    "wanda, OWL": (METHODS["wanda"], Unstructured(0.5)),
    "wanda 2:4, permuted": (METHODS["wanda"], SemiStructured(2, 4)),
}
BATCHES = token_batches(batches=4, batch_size=2, length=32)


MODELS = {"llama": tiny_llama, "mixtral": tiny_mixtral}


def prune(processes: Processes, model: str, name: str, folder: Path | None = None):
    net = MODELS[model]()
    method, pattern = RUNS[name]
    journal = Journal(folder / f"{model} {name}") if folder else None
    batches = BATCHES[processes.rank :: processes.size]
    settings = {"processes": processes, "journal": journal, "true_sequential": name.endswith("one pass")}
    settings |= {"allocation": OWL(factor=3) if name.endswith("OWL") else None, "permute": name.endswith("permuted")}
    report = prune_model(net, batches, method, pattern, **settings)
    return net.state_dict(), [(row.name, row.tokens, row.sparsity, row.error) for row in report.linears]


def reconstruct(processes: Processes, model: str, size: int):
    """Train on a batch of every process at a step; one process does the same with these batches in one.

    The first process has a batch more: it trains on three and the others on two; the last of each is held out.
    """
    rows = token_batches(batches=3 * size + 1, batch_size=2, length=16)
    steps = [rows[:size], rows[size : 2 * size], [rows[2 * size]], rows[2 * size + 1 :]]
    batches = rows[processes.rank :: size] if processes.size > 1 else [*map(torch.cat, steps)]
    net = MODELS[model]()
    settings = Reconstruction(epochs=2, lr=1e-3)
    report = prune_model(net, batches, Magnitude(), Unstructured(0.5), reconstruction=settings, processes=processes)
    return net.state_dict(), [(layer.before, layer.after) for layer in report.reconstruction.values()]


def aimed(processes: Processes, size: int):
    """Fit linears to the dense model; each process has a part with every fourth batch held out."""
    batches = token_batches(batches=4 * size, batch_size=4, length=16)
    mine = batches[4 * processes.rank :][:4] if processes.size > 1 else batches
    net = tiny_llama()
    report = prune_model(net, mine, SparseGPT(16), Unstructured(0.5), dense_target=True, processes=processes)
    return net.state_dict(), [row.dense_target for row in report.linears]


def least_loss(processes: Processes):
    """Each process measures and judges on batches of its own; all have to end with the same split."""
    net = tiny_llama()
    allocation = LeastLoss(step=0.125, rounds=2)
    report = prune_model(
        net, BATCHES[processes.rank :: processes.size], "wanda", 0.5, allocation=allocation, processes=processes
    )
    return net.state_dict(), (dict(report.allocation.patterns), report.allocation.story)


def forked(processes: Processes):
    """Each process sees batches of a length of its own, and so the linears of a layer in an order of its own."""
    model = tiny_llama()
    torch.manual_seed(0)
    model.model.layers[1].mlp = Forked()
    batches = [token_batches(1, length=16), token_batches(1, length=6)]
    mine = [batch for some in batches[processes.rank :: processes.size] for batch in some]
    report = prune_model(
        model, mine, Wanda(), Unstructured(0.5), processes=processes, true_sequential=True, targets=["layers.1.*"]
    )
    return model.state_dict(), report.order


def refused(processes: Processes) -> str:
    """One process has no batch, or one with NaN in its hidden states: what do all say?"""
    said = []
    try:
        prune_model(tiny_llama(), [] if processes.rank else BATCHES, Wanda(), Unstructured(0.5), processes=processes)
    except ValueError as error:
        said.append(str(error))
    model = tiny_llama()
    model.model.embed_tokens.weight.data[7] = float("nan")
    batches = [batch.masked_fill(batch == 7, 8) for batch in BATCHES]
    if processes.rank == processes.size - 1:
        batches[0][1, 0] = 7
    try:
        prune_model(model, batches, Wanda(), Unstructured(0.5), processes=processes)
    except ValueError as error:
        said.append(str(error))
    return " | ".join(said)


def run(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    processes = Processes()
    found = {(model, name): prune(processes, model, name) for model in MODELS for name in RUNS}
    # The second time every layer comes out of the journal, which only the first process reads.
    first = prune(processes, "mixtral", "sparsegpt", Path(folder))
    found["recorded"] = first
    found["restored"] = prune(processes, "mixtral", "sparsegpt", Path(folder))
    found |= {(model, "reconstruction"): reconstruct(processes, model, size) for model in MODELS}
    found["aimed"] = aimed(processes, size)
    found["least loss"] = least_loss(processes)
    found["refused"] = refused(processes)
    if size == 2:
        found["forked"] = forked(processes)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    multiprocessing.start_processes(run, (size, sys.argv[2]), nprocs=size, start_method="fork")
