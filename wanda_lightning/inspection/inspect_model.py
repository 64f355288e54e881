"""What pruning a model would touch and take, without loading it; and how sparse the weights in its folder are.

The model is built on the meta device from its config alone.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch

from wanda_lightning.arguments import Dtype, checked_device, checked_dtype, plain, whole_number
from wanda_lightning.checkpoints.folders import model_folder
from wanda_lightning.checkpoints.tensor_files import opened, weight_files
from wanda_lightning.inspection.estimates import estimate_memory, estimate_seconds
from wanda_lightning.inspection.kinds import LinearKind, linear_kinds
from wanda_lightning.inspection.meta_runs import calls_a_layer
from wanda_lightning.inspection.stored_weights import StoredWeights, stored_weights
from wanda_lightning.model.decoder import coverage, decoder_layers
from wanda_lightning.model.language_model import max_sequence_length
from wanda_lightning.report.tables import in_bytes, terminal_table

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Data types as files name them."""


@dataclass(frozen=True)
class Inspection:
    """What is prunable in a model, and what pruning it would take.

    Attributes:
        model: Class of the model.
        layers: Names of its decoder layers.
        kinds: Its prunable linears.
        left_dense: How many other matrices the decoder has, by the reason they are left dense.
        coverage: Share of the decoder's matrix weights that is prunable.
        parameters: Number of all parameters.
        memory: Bytes by purpose.
        seconds: Estimated time on the device by purpose.
        timed_for: What these times are for: windows, tokens and the device with its threads.
        weights: The weights in the folder, if it holds weight files.
    """

    model: str
    layers: list[str]
    kinds: list[LinearKind]
    left_dense: dict[str, int]
    coverage: float
    parameters: int
    memory: dict[str, int]
    seconds: dict[str, float]
    timed_for: str
    weights: StoredWeights | None = None

    @property
    def summary(self) -> str:
        """The kind of model and its size."""
        return (
            f"{self.model}: {self.parameters:,} parameters, {len(self.layers)} decoder layers "
            f"({self.layers[0]} to {self.layers[-1]})"
        )

    def __repr__(self) -> str:
        return f"{self.summary}; {self.coverage:.2%} of their matrix weights are prunable"

    def to_table(self) -> Any:
        """Return tables for a rich console."""
        from rich.console import Group

        linears = [
            [each.name, f"{each.shape[0]} x {each.shape[1]}", f"{each.count}", _letter(each)] for each in self.kinds
        ]
        costs = [[f"memory: {purpose}", in_bytes(size)] for purpose, size in self.memory.items()]
        costs += [
            [f"time: {purpose}", f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"]
            for purpose, seconds in self.seconds.items()
        ]
        dense = ", ".join(f"{number} {reason}" for reason, number in self.left_dense.items()) or "none"
        return Group(
            self.summary,
            terminal_table(["prunable linear", "out x in", "number", "input"], linears, left=(0, 1, 3)),
            "Linears with the same letter share one input, and so one statistic and one factorisation.",
            f"{self.coverage:.2%} of the matrix weights of the decoder layers are prunable; left dense: {dense}",
            terminal_table(["estimate", ""], costs),
            f"Times are for {self.timed_for}; loading, evaluating and saving come on top.",
            *([self.weights.to_table()] if self.weights else []),
        )


def inspect_model(
    pretrained: str | Path,
    num_samples: int = 128,
    sequence_length: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Inspection:
    """Look at a model's config: what would be pruned, and what that would take; and at the weights in its folder.

    The weights are read tensor by tensor, so that a model of any size can be looked at.

    Args:
        pretrained: A hub name, of which only the config is read, or the folder of a model or of a run.
        num_samples: Calibration windows.
        sequence_length: Tokens in a window. Default: as much as the model takes, at most 2048.
        dtype: Data type of weights and activations; see :func:`wanda_lightning.load_model`.
        device: Where pruning would run. Its speed is measured in about a second.
        trust_remote_code: Run code that the model's author put beside it.

    Returns:
        What was found.

    Raises:
        ValueError: If there is no such model, or it has no decoder layers; if nothing can be computed in the data
            type; if a number is too small, the windows are longer than the model takes, or there is no such device; or
            if a weight file is missing or cut off.
    """
    from wanda_lightning.checkpoints.loading import build_skeleton, load_config

    num_samples, sequence_length = plain(num_samples), plain(sequence_length)
    whole_number("num_samples", num_samples, 1)
    if sequence_length is not None:
        whole_number("sequence_length", sequence_length, 2)
    wanted, place = checked_dtype(dtype), checked_device(device)
    folder = Path(model_folder(pretrained)).expanduser()
    config = load_config(pretrained, trust_remote_code=trust_remote_code)
    tokens = _tokens(config, sequence_length)
    dtype = wanted or _stored_dtype(folder, config)
    model = build_skeleton(config, dtype=dtype, trust_remote_code=trust_remote_code)
    layers = decoder_layers(model)
    kinds, calls = linear_kinds(model, layers), calls_a_layer(model, layers)
    left_dense = Counter(reason for layer in layers for reason in layer.left_dense.values())
    return Inspection(
        model=type(model).__name__,
        layers=[layer.name for layer in layers],
        kinds=kinds,
        left_dense=dict(left_dense),
        coverage=coverage(layers),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory=estimate_memory(model, layers, kinds, num_samples, tokens, calls),
        seconds=estimate_seconds(model, layers, kinds, num_samples, tokens, calls, place),
        timed_for=f"{num_samples} windows of {tokens} tokens in {_name(model.dtype)} on {_described(place)}",
        weights=stored_weights(folder, model, layers) if folder.is_dir() else None,
    )


def _tokens(config: Any, asked: int | None) -> int:
    """Return the length of the windows, as a datamodule chooses it."""
    limit = max_sequence_length(config)
    if asked is not None and limit is not None and asked > limit:
        raise ValueError(f"sequence_length must be at most {limit}, the model's max_position_embeddings, got {asked}")
    return asked or min(2048, limit or 2048)


def _stored_dtype(folder: Path, config: Any) -> torch.dtype:
    """Return the checkpoint's data type; refuse those that products are not defined for, such as float8."""
    stored = getattr(config, "dtype", None) or _dtype_of_files(folder)
    if _name(stored) not in get_args(Dtype):
        raise ValueError(
            f"{folder} is stored in {_name(stored)}, in which nothing can be pruned: "
            "de-quantise it first, or say what it will be loaded in, such as --dtype bfloat16"
        )
    return cast(torch.dtype, getattr(torch, _name(stored)))


def _dtype_of_files(folder: Path) -> torch.dtype:
    """Return what transformers goes by where a config names no data type: that of the first numbers in the files."""
    for file in weight_files(folder)[:1] if folder.is_dir() else []:
        with opened(file) as tensors:
            names = (tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118 (not a dict)
            return next((FLOATS[name] for name in names if name in FLOATS), torch.float32)
    return torch.float32


def _letter(kind: LinearKind) -> str:
    return "" if kind.input_group is None else chr(ord("A") + kind.input_group)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _described(device: torch.device) -> str:
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"the CPU with {threads} thread{'s' if threads > 1 else ''}"
