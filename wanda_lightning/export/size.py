"""How large a pruned model is once it is compressed, without writing it."""

import json
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import nn

from wanda_lightning.checkpoints.tensor_files import Entry, weight_files
from wanda_lightning.export.bitmask import CHECKSUM, HEADER, SHAPES, compressed_file_size, parts_of, size_of
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.offload import stored_tensors
from wanda_lightning.sparsity import Pattern, nonzeros

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def compressed_size(folder: str | Path) -> int:
    """Measure the weights of a saved model as :func:`wanda_lightning.compress` would write them.

    Args:
        folder: A model with safetensors weights.

    Returns:
        Bytes of the weight files.
    """
    return sum(map(compressed_file_size, weight_files(Path(folder))))


def expected_zeros(linears: Iterable[tuple[PrunableLinear, Pattern]]) -> list[tuple[nn.Parameter, int, int]]:
    """Calculate how many weights go where every output row loses what its pattern says.

    Args:
        linears: What is to be pruned, and to what; several may have one matrix.

    Returns:
        For each matrix, once: the parameter that holds it, how many of its weights go, and how many there are.
    """
    matrices = {(x.weight, x.expert, x.projection): (x.weight_OI.shape, pattern) for x, pattern in linears}
    return [
        (weight, rows * pattern.count(columns), rows * columns)
        for (weight, _, _), ((rows, columns), pattern) in matrices.items()
    ]


class CompressedSize:
    """How large a model in memory will be, pruned and compressed.

    Args:
        model: The model, dense.
    """

    def __init__(self, model: nn.Module) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}  # each once, if it is tied
        copies = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {*names.values()}
        stored = [(name, values) for name, values in stored_tensors(model) if name not in copies]
        self._names = names
        self._stored = [
            (Entry(name, TYPES.get(values.dtype, "F32"), values.shape, values.nbytes), nonzeros(values))
            for name, values in sorted(stored, key=lambda each: (-each[1].itemsize, each[0]))
        ]

    def expected(self, linears: Iterable[tuple[PrunableLinear, Pattern]]) -> int:
        """Calculate the bytes of the weight files.

        Exact where every output row loses the same number of weights, as with Wanda, and the model is saved with its
        parameters as they are. Else near to it: methods that compare within other groups remove a little more, and
        fused experts, which are saved one by one, have longer headers.

        Args:
            linears: What is to be pruned, and to what; several may have one matrix.

        Returns:
            The bytes.
        """
        pruned: Counter[str] = Counter()
        for weight, gone, _ in expected_zeros(linears):
            pruned[self._names[id(weight)]] += gone
        entries: list[Entry] = []
        shapes: dict[str, list[int]] = {}
        for stored, nonzero in self._stored:
            parts = parts_of(stored, min(nonzero, prod(stored.shape) - pruned[stored.name]))
            if len(parts) > 1:
                shapes[stored.name] = list(stored.shape)
            entries += parts
        checksums = {CHECKSUM: 64 * "0", HEADER: 64 * "0"}
        return size_of(entries, {"format": "pt", SHAPES: json.dumps(shapes), **checksums})
