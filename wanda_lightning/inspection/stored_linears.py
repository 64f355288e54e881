"""The prunable matrices among the tensors of a checkpoint. Shapes: O out features, I in features."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import THIN, PrunableLinear
from wanda_lightning.model.names import is_router, kind_of
from wanda_lightning.sparsity import SemiStructured, max_kept_per_group


@dataclass(frozen=True)
class StoredLinear:
    """A prunable matrix of a decoder layer as it is stored.

    Attributes:
        name: Its name in the model, or in the file where the model fuses it.
        layer: Number of the decoder layer.
        kind: Its name within the layer, ``*`` for the numbers of experts.
        shape: (out_features, in_features).
        zeros: Number of weights that are zero.
        patterns: N:M patterns that every group of its weights keeps to, the tightest first.
    """

    name: str
    layer: int
    kind: str
    shape: tuple[int, int]
    zeros: int
    patterns: list[str]

    @property
    def sparsity(self) -> float:
        """Fraction of its weights that are zero."""
        return self.zeros / (self.shape[0] * self.shape[1])

    def __str__(self) -> str:
        return f"{self.name} ({self.sparsity:.2%} zeros, {self.patterns[0] if self.patterns else 'no n:m pattern'})"


class MatrixFinder:
    """Tells which stored tensors are prunable, by the names of linears in the model or in files of transformers.

    Within a layer these are names that the model has there, or those under which transformers saves them. Where the
    model fuses experts, they may be stored one by one and under other names. So a stored weight whose name the model
    does not have counts as well, unless it is thin or a router's; scales of quantised ones are no weights.
    """

    def __init__(self, model: nn.Module, layers: Sequence[DecoderLayer]) -> None:
        self._renamed = _renamed(model, layers)
        self._first: dict[str, int] = {}  # number of the first layer, by list
        self._linears: dict[tuple[int, str], list[PrunableLinear]] = {}
        for number, layer in enumerate(layers):
            self._first.setdefault(layer.list_name, number)
            self._linears |= {(number, name): [] for name, _ in layer.module.named_parameters()}
            for linear in layer.linears:
                self._linears[number, linear.parameter_name.removeprefix(f"{layer.name}.")].append(linear)
        ends = "|".join(re.escape(name.rpartition(".")[2]) for name in self._first)
        self._pattern = re.compile(rf"((?:.*?\.)?(?:{ends}))\.(\d+)\.(.+)")

    def place(self, name: str) -> tuple[int, str] | None:
        """Return the layer's number and the tensor's name in it; None for what is not in a decoder layer."""
        match = self._pattern.fullmatch(self._renamed.get(name, name))
        if match is None:
            return None
        # Files may have a prefix more than the model, or leave parts of the name out (model.layers for what is
        # model.language_model.layers in Qwen2-VL), or turn them round (language_model.model.layers).
        for name, first in self._first.items():
            if f".{match[1]}".endswith(f".{name}") or {*match[1].split(".")} <= {*name.split(".")}:
                return first + int(match[2]), match[3]
        return None

    def matrices(self, name: str, place: tuple[int, str], tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the prunable matrices of a tensor by name, each seen as (out_features, in_features)."""
        linears = self._linears.get(place)
        if linears is None and tensor.dim() == 2 and tensor.is_floating_point():
            if name.endswith(".weight") and min(tensor.shape) > THIN and not is_router(place[1]):
                yield name.removesuffix(".weight"), tensor
        elif linears and tensor.shape == linears[0].weight.shape:
            yield from ((linear.name, linear.view(tensor)) for linear in linears)


def _renamed(model: nn.Module, layers: Sequence[DecoderLayer]) -> dict[str, str]:
    """Map names in files to those in the model, of the weights that transformers saves as they are but renamed."""
    from transformers.core_model_loading import revert_weight_conversion

    names: dict[str, list[str]] = {}
    for layer in layers:
        for name, weight in layer.module.named_parameters(prefix=layer.name):
            (stored, values), *others = revert_weight_conversion(model, {name: weight}).items()
            if not others and values.shape == weight.shape:
                names.setdefault(stored, []).append(name)
    return {stored: each[0] for stored, each in names.items() if len(each) == 1}  # of several, it is fused in files


def measure(name: str, place: tuple[int, str], weight_OI: Tensor, patterns: Sequence[SemiStructured]) -> StoredLinear:
    """Count the zeros of a matrix, and find which patterns it keeps to.

    Args:
        name: The matrix.
        place: Number of its layer, and the stored tensor's name in it.
        weight_OI: Its weights.
        patterns: What to look for, the tightest first.

    Returns:
        What was found.
    """
    kept_OI = weight_OI != 0
    rows, columns = kept_OI.shape
    most = {m: max_kept_per_group(kept_OI, m) for m in {pattern.m for pattern in patterns} if columns % m == 0}
    held = [str(pattern) for pattern in patterns if most.get(pattern.m, pattern.m) <= pattern.n]
    kind = kind_of(place[1].removesuffix(".weight"))
    return StoredLinear(name, place[0], kind, (rows, columns), rows * columns - int(kept_OI.count_nonzero()), held)
