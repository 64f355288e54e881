"""Removing hidden neurons, and moving them: rows of the matrices that write them, columns of the one that reads them.

Shapes: O out features, I in features (the neurons of the matrix that reads them), K kept neurons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from wanda_lightning.model.linears import PrunableLinear

Layout = Literal["once", "halves", "pairs"]
"""Where the rows of neuron j of n are: j; j and n + j (gate and up in one matrix); or 2 j and 2 j + 1."""


@dataclass(frozen=True)
class HeadRows:
    """Where the rows of key/value groups are in a matrix that writes keys or values, or all in one matrix.

    Attributes:
        size: Numbers of a head.
        share: Heads of queries that share a key and a value.
        with_queries: Whether the matrix holds queries, keys and values, one after the other.
    """

    size: int
    share: int
    with_queries: bool

    def of(self, kept_K: Tensor, width: int) -> Tensor:
        """Number the rows that belong to the outputs of heads, which are whole groups."""
        groups_G = kept_K[:: self.share * self.size] // (self.share * self.size)
        keys_R = (groups_G[:, None] * self.size + torch.arange(self.size, device=kept_K.device)).flatten()
        if not self.with_queries:
            return keys_R
        return torch.cat([kept_K, width + keys_R, width + width // self.share + keys_R])


@dataclass(frozen=True)
class Neurons:
    """The hidden neurons of one MLP, or of one expert; or what the heads of an attention give.

    Attributes:
        name: The module that holds them; fused experts have a number behind it.
        module: That module.
        reader: The matrix whose inputs they are.
        writers: The matrices whose outputs they are made of, and where in these.
        block: How many of them go together: of heads, those that share a key and a value.
    """

    name: str
    module: nn.Module
    reader: PrunableLinear
    writers: tuple[tuple[PrunableLinear, Layout | HeadRows], ...]
    block: int = 1

    @property
    def width(self) -> int:
        """How many there are."""
        return self.reader.weight_OI.shape[1]

    @property
    def linears(self) -> tuple[PrunableLinear, ...]:
        """The matrices that change when neurons go."""
        return (self.reader, *(writer for writer, _ in self.writers))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights and biases that change when neurons go or move, by name; experts share them."""
        found = {linear.parameter_name: linear.weight for linear in self.linears}
        for writer, _ in self.writers:
            if (bias := _bias(writer)) is not None:
                found[f"{writer.parameter_name.rpartition('.')[0]}.{_bias_name(writer)}"] = bias
        return found

    def within(self, twins: Mapping[nn.Module, nn.Module]) -> "Neurons":
        """Return the same neurons in another model, given the modules there by those here."""

        def twin(linear: PrunableLinear) -> PrunableLinear:
            return replace(linear, module=twins[linear.module])

        writers = tuple((twin(linear), layout) for linear, layout in self.writers)
        return replace(self, module=twins[self.module], reader=twin(self.reader), writers=writers)


@torch.no_grad()
def keep_neurons(groups: Sequence[Neurons], kept: Sequence[Tensor]) -> None:
    """Remove all neurons but some. The parameters are new ones: no optimizer may hold the old ones yet.

    Args:
        groups: Groups of neurons; of fused experts all that share a parameter.
        kept: For each group the numbers of the neurons that stay, ascending, shape (K,); K is the same for groups that
            share a parameter.
    """
    slices: dict[tuple[nn.Module, str], list[tuple[PrunableLinear, int, Tensor]]] = {}
    for neurons, kept_K in zip(groups, kept, strict=True):
        width = neurons.width
        cuts = [(neurons.reader, 1, kept_K)]
        cuts += [(writer, 0, _rows(kept_K, width, layout)) for writer, layout in neurons.writers]
        for linear, axis, index_K in cuts:
            slices.setdefault((linear.module, linear.parameter), []).append((linear, axis, index_K))
    for (module, parameter), cuts in slices.items():
        _shrink_weight(module, parameter, cuts)
        if cuts[0][1] == 0:
            _shrink_bias(module, cuts)


@torch.no_grad()
def reorder_neurons(neurons: Neurons, order_I: Tensor) -> None:
    """Let neurons stand in another order, in place; what their module computes stays the same.

    Args:
        neurons: The neurons.
        order_I: Their numbers in the new order, shape (I,).
    """
    reader, order_I = neurons.reader, order_I.to(neurons.reader.weight.device)
    reader.weight_OI.copy_(reader.weight_OI[:, order_I])
    for writer, layout in neurons.writers:
        rows_O = _rows(order_I, neurons.width, layout).to(writer.weight.device)
        writer.weight_OI.copy_(writer.weight_OI[rows_O])
        if (bias := _bias(writer)) is not None:
            bias_O = bias.detach() if writer.expert is None else bias.detach()[writer.expert]
            bias_O.copy_(bias_O[rows_O])


def _rows(kept_K: Tensor, width: int, layout: Layout | HeadRows) -> Tensor:
    """Number the rows of a writing matrix that belong to some neurons."""
    if isinstance(layout, HeadRows):
        return layout.of(kept_K, width)
    if layout == "once":
        return kept_K
    if layout == "halves":
        return torch.cat([kept_K, width + kept_K])
    return torch.stack([2 * kept_K, 2 * kept_K + 1], 1).flatten()


def _shrink_weight(module: nn.Module, parameter: str, cuts: list[tuple[PrunableLinear, int, Tensor]]) -> None:
    matrices = [
        (linear, linear.weight_OI.index_select(axis, index_K.to(linear.weight.device)))
        for linear, axis, index_K in cuts
    ]
    first, matrix_OI = matrices[0]
    shape = tuple(reversed(matrix_OI.shape)) if first.is_transposed else tuple(matrix_OI.shape)
    weight = first.weight.new_empty(shape if first.expert is None else (len(matrices), *shape))
    for linear, matrix_OI in matrices:
        linear.view(weight).copy_(matrix_OI)
    setattr(module, parameter, nn.Parameter(weight, requires_grad=first.weight.requires_grad))
    if first.expert is None:
        sizes = dict(zip(("out_features", "in_features"), matrices[0][1].shape, strict=True))
        sizes = sizes if hasattr(module, "in_features") else {"nf": sizes["out_features"], "nx": sizes["in_features"]}
        for name, size in sizes.items():
            setattr(module, name, size)


def _shrink_bias(module: nn.Module, cuts: list[tuple[PrunableLinear, int, Tensor]]) -> None:
    if (bias := _bias(cuts[0][0])) is not None:
        rows = [bias.detach() if linear.expert is None else bias.detach()[linear.expert] for linear, _, _ in cuts]
        kept = [row_O[index_K.to(row_O.device)] for row_O, (_, _, index_K) in zip(rows, cuts, strict=True)]
        smaller = kept[0] if cuts[0][0].expert is None else torch.stack(kept)
        setattr(module, _bias_name(cuts[0][0]), nn.Parameter(smaller, requires_grad=bias.requires_grad))


def _bias_name(linear: PrunableLinear) -> str:
    return "bias" if linear.expert is None else f"{linear.parameter}_bias"


def _bias(linear: PrunableLinear) -> nn.Parameter | None:
    return cast(Any, getattr(linear.module, _bias_name(linear), None))
