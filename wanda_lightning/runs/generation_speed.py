"""``wanda-lightning speed A B ...``: how fast models generate on the machine at hand, measured in turns.

Turns (A B B A ...) make the machine's other work, and what a model leaves in the caches for the next, fall on all
models alike: what compares is the ratio within a round.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wanda_lightning.arguments import checked_device, checked_dtype, plain, several, whole_number
from wanda_lightning.checkpoints.folders import model_folder
from wanda_lightning.checkpoints.loading import load_config, load_model
from wanda_lightning.checkpoints.quiet import quiet_if_small
from wanda_lightning.checkpoints.tensor_files import weight_files
from wanda_lightning.model.language_model import max_sequence_length
from wanda_lightning.report.environment import environment
from wanda_lightning.runs.speed_report import ModelSpeed, SpeedReport
from wanda_lightning.runs.tensor_memory import peak_on_top, weight_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 16  # tokens that stand before those that are decoded


def measure_speed(
    models: Sequence[str | Path],
    prompt: int = 512,
    new_tokens: int = 32,
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 10,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> SpeedReport:
    """Measure how fast models read a prompt and decode, and what they take, against the first of them.

    Every model generates greedily, by transformers' ``generate``, from the same random tokens: one prompt, and
    ``new_tokens`` tokens behind 16 at each batch size. A first round is not counted; in it, memory is measured.

    Args:
        models: Hub names, folders or ``.gguf`` files, as :func:`wanda_lightning.load_model` takes them; each is loaded
            once, and all stay in memory.
        prompt: Tokens of the prompt.
        new_tokens: Tokens that are decoded.
        batch_sizes: Sequences that are decoded at once.
        rounds: How often each model has its turn; fewer than 6 are too few to call a difference one.
        dtype: See :func:`wanda_lightning.load_model`.
        device: Where it computes. Default: the GPU, if there is one that torch can use.
        trust_remote_code: Run code that the models' authors put beside them.
        progress: Show a bar, on the standard error.

    Returns:
        Every measurement, with what follows from it.

    Raises:
        ValueError: If no model is named or one cannot be loaded, a number is too small, the models have no room for as
            many tokens, or there is no such device. All but broken weights is seen before a model is loaded.
    """
    several("models", models)
    several("batch_sizes", batch_sizes)
    prompt, new_tokens, rounds, *batch_sizes = map(plain, (prompt, new_tokens, rounds, *batch_sizes))
    if not models:
        raise ValueError("nothing to measure: name one or more models, the dense one first")
    for name, value in {"prompt": prompt, "new_tokens": new_tokens, "rounds": rounds}.items():
        whole_number(name, value, 1)
    if not batch_sizes:
        raise ValueError(f"batch_sizes must be one or more whole numbers of at least 1, got {batch_sizes!r}")
    for batch_size in batch_sizes:
        whole_number("batch_sizes", batch_size, 1)
    checked_dtype(dtype)
    names = [model_folder(model) for model in models]
    trusted = {"trust_remote_code": trust_remote_code}
    vocabulary = min(_vocabulary(name, max(prompt, CONTEXT + new_tokens), **trusted) for name in names)
    place = checked_device(device)
    loaded = [_load(name, dtype, place, **trusted) for name in names]
    random = torch.Generator().manual_seed(0)
    ids_1P = torch.randint(vocabulary, (1, prompt), generator=random, device="cpu").to(place)
    ids_1C = ids_1P[:, :CONTEXT]  # shorter, if the prompt is
    inputs = {f"decoding (batch {size})": (ids_1C.repeat(size, 1), new_tokens) for size in dict.fromkeys(batch_sizes)}
    inputs[f"prompt ({prompt} tokens)"] = (ids_1P, 0)

    memory = [
        weight_bytes(model) + max(peak_on_top(partial(_rate, model, *given), place) for given in inputs.values())
        for model in loaded
    ]
    rates = _rates_in_turns(loaded, inputs, rounds, progress)
    measured = [
        replace(_described(name, model), memory=peak, tokens_per_second=speeds)
        for name, model, peak, speeds in zip(names, loaded, memory, rates, strict=True)
    ]
    settings = {"prompt": prompt, "new_tokens": new_tokens, "context": ids_1C.shape[1], "rounds": rounds}
    where = {"device": str(place), "threads": torch.get_num_threads()}
    return SpeedReport(measured, settings, where | {"environment": environment()})


def _rates_in_turns(
    models: Sequence["PreTrainedModel"], inputs: Mapping[str, tuple[Tensor, int]], rounds: int, progress: bool
) -> list[dict[str, list[float]]]:
    """Return, of each model, the rate of every round by what it was given."""
    from rich.console import Console
    from rich.progress import track

    rates: list[dict[str, list[float]]] = [{what: [] for what in inputs} for _ in models]
    numbers = [*range(len(models))]
    turns = [(what, number) for n in range(rounds) for what in inputs for number in numbers[:: -1 if n % 2 else 1]]
    for what, number in track(
        turns, "measuring in turns", console=Console(stderr=True), transient=True, disable=not progress
    ):
        rates[number][what].append(_rate(models[number], *inputs[what]))
    return rates


def _vocabulary(pretrained: str, length: int, **trusted: bool) -> int:
    """Return how many tokens a model knows; refuse one that has no room for so many."""
    config = load_config(pretrained, **trusted)
    limit = max_sequence_length(config)
    if limit is not None and length > limit:
        raise ValueError(f"{pretrained} has positions for {limit} tokens, and prompt or new_tokens ask for {length}")
    return config.get_text_config().vocab_size


def _load(pretrained: str, dtype: str | torch.dtype, device: torch.device, **trusted: bool) -> "PreTrainedModel":
    from transformers import GenerationConfig

    with quiet_if_small(pretrained):
        model: Any = load_model(pretrained, dtype, **trusted).eval().to(device)
    for parameter in model.parameters():  # out of the file's pages: the kernel lays out those of some files better
        parameter.data = parameter.data.clone()
    # Its own might draw at random, or stop before the end.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model


class _Stopwatch:
    """Takes the time of every token; ``generate`` calls it with the prompt, then with each token on the CPU."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _rate(model: "PreTrainedModel", ids_BT: Tensor, new_tokens: int) -> float:
    """Return tokens a second: those decoded behind the first new one, or if there are none those of the prompt."""
    stopwatch: Any = _Stopwatch()
    model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new_tokens + 1, streamer=stopwatch)
    start, first, *_ = times = stopwatch.times
    if not new_tokens:
        return ids_BT.numel() / (first - start)
    return len(ids_BT) * new_tokens / (times[-1] - first)


def _described(name: str, model: "PreTrainedModel") -> ModelSpeed:
    """Count a model's weights."""
    parameters = [*model.parameters()]
    count = sum(weight.numel() for weight in parameters)
    looked_up: Any = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is looked_up
    return ModelSpeed(
        name=name,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=count,
        multiplied=count if tied else count - looked_up.numel(),
        zeros=sum(int((weight == 0).sum()) for weight in parameters) / count,
        file=_file_bytes(name),
    )


def _file_bytes(pretrained: str) -> int:
    """Return the bytes of a model's weight files."""
    from huggingface_hub import snapshot_download

    path = Path(pretrained).expanduser()
    if path.is_file():
        return path.stat().st_size
    folder = path if path.is_dir() else Path(snapshot_download(pretrained, local_files_only=True))
    return sum(file.stat().st_size for file in weight_files(folder) or folder.glob("*.bin"))
