"""The heads of attention that share a key and a value: which matrices write them, and which one reads them.

Their numbers are those that a config of transformers says under names that all families share. Which matrices are of
these heads is found by their shapes, and tried out: the attention that a config with fewer heads describes, given what
is left of the matrices, has to compute what the whole one does when nothing reads the heads that went.

Shapes: K kept outputs of heads.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from wanda_lightning.model.configuration import Path, change, shapes_of, skeleton
from wanda_lightning.model.coupling import can_go, matrices_within, random_copy, seen_in, those_that_work
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.linears import PrunableLinear, own_modules
from wanda_lightning.model.neurons import HeadRows, Layout, Neurons, keep_neurons

Writer = tuple[PrunableLinear, Layout | HeadRows]


@dataclass(frozen=True)
class Heads:
    """How many heads the attention of a decoder has.

    Attributes:
        config: The names that lead to the decoder's config in that of the model.
        heads: Number of heads of queries.
        groups: Number of keys and values, each shared by heads / groups of them.
        size: Numbers of a head.
    """

    config: Path
    heads: int
    groups: int
    size: int

    @classmethod
    def of(cls, model: Any) -> "Heads":
        """Read a model's config.

        Args:
            model: A causal language model of transformers.

        Returns:
            What it says.

        Raises:
            ValueError: If it does not say how many heads there are.
        """
        config = model.config.get_text_config(decoder=True)
        path = tuple(name for name, value in vars(model.config).items() if value is config)
        heads = _said(config, "num_attention_heads")
        groups = _said(config, "num_key_value_heads") or heads
        hidden = _said(config, "hidden_size")
        size = _said(config, "head_dim") or (hidden // heads if type(heads) is type(hidden) is int else None)
        if not (type(heads) is type(groups) is type(size) is int) or heads % groups:
            raise ValueError(
                f"{type(config).__name__} says num_attention_heads={heads!r}, num_key_value_heads={groups!r}, "
                f"head_dim={size!r}: key/value groups can be removed where every layer has as many heads, and each "
                "group of them as many; leave attention_keep at 1"
            )
        return cls(path, heads, groups, size)

    @property
    def share(self) -> int:
        """How many heads share a key and a value."""
        return self.heads // self.groups

    @property
    def block(self) -> int:
        """How many numbers the heads of a group give."""
        return self.share * self.size

    def numbers(self, groups: int) -> dict[Path, tuple[int, int]]:
        """Return what a config says and is to say with fewer groups; the size of a head has to be said then."""
        pairs = {
            "head_dim": (self.size, self.size),
            "num_attention_heads": (self.heads, self.share * groups),
            "num_key_value_heads": (self.groups, groups),
        }
        return {(*self.config, name): pair for name, pair in pairs.items()}


def _said(config: Any, name: str) -> Any:
    """Return what a config says for all layers; None if it says nothing, or something else for every layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own for what is said layer by layer; it is not exported
        return None


def skeleton_with(model: Any, numbers: dict[Path, tuple[int, int]]) -> nn.Module:
    """Build the model that a config with other numbers describes, on the meta device.

    Args:
        model: The model.
        numbers: What the config says and is to say, by the names that lead there.

    Returns:
        The model without values.

    Raises:
        ValueError: If the config does not take these numbers.
    """
    config = copy.deepcopy(model.config)
    try:
        for path, pair in numbers.items():
            change(config, path, *pair)
        return skeleton(model, config)
    except Exception as error:  # a family's own checks raise errors of many kinds
        said = ", ".join(f"{path[-1]}={after}" for path, (_, after) in numbers.items())
        raise ValueError(f"{type(config).__name__} does not take {said}: {' '.join(str(error).split())}") from error


@torch.no_grad()
def find_heads(
    model: nn.Module, layers: Sequence[DecoderLayer], heads: Heads, groups: int
) -> tuple[dict[str, list[Neurons]], nn.Module]:
    """Find the outputs of the heads of every decoder layer.

    Args:
        model: The causal language model, in eval mode; run once on a few tokens.
        layers: Its decoder layers.
        heads: How many heads they have.
        groups: How many key/value groups are to stay, fewer than there are.

    Returns:
        The outputs of heads by the name of the layer, none where a layer has no such attention; and the model with
        fewer heads, on the meta device.

    Raises:
        ValueError: If the attention of the model is of another form, or its config cannot say that there are fewer.
    """
    smaller = skeleton_with(model, heads.numbers(groups))
    built = dict(own_modules(smaller))

    def works(group: Sequence[Neurons], *call: Any) -> bool:
        return _works(group[0], groups, built[group[0].name], *call)

    found = those_that_work(model, layers, partial(_candidates, heads=heads), works)
    _check(model, layers, heads, groups, found, smaller)
    return found, smaller


def _candidates(layer: DecoderLayer, heads: Heads) -> Iterator[list[Neurons]]:
    """Yield what may be heads by the shapes of matrices in one module."""
    modules = dict(own_modules(layer.module, layer.name))
    queries, keys = heads.heads * heads.size, heads.groups * heads.size
    for holder, matrices in matrices_within(layer).items():
        linears = {name: each[0] for name, each in matrices.items() if each[0].expert is None}
        for place, reader in linears.items():
            others = [(linear, linear.weight_OI.shape[0]) for name, linear in linears.items() if name != place]
            alone, together = (HeadRows(heads.size, heads.share, with_queries) for with_queries in (False, True))
            fused: list[Writer] = [(linear, together) for linear, rows in others if rows == queries + 2 * keys]
            apart: list[Writer] = [(linear, "once") for linear, rows in others if rows == queries]
            if keys != queries:
                apart += [(linear, alone) for linear, rows in others if rows == keys]
            for writers, number in ((apart, 3), (fused, 1)):
                if reader.weight_OI.shape[1] == queries and len(writers) == number:
                    yield [Neurons(holder, modules[holder], reader, tuple(writers), heads.block)]


def _works(heads: Neurons, groups: int, built: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Remove all groups but the last ones from a copy, and see whether it is as if nobody read them."""

    def as_built(module: nn.Module) -> nn.Module:
        """Give the attention that the config describes the values that are left, as loading does."""
        smaller = copy.deepcopy(built).to_empty(device=heads.reader.weight.device).float().eval()
        smaller.load_state_dict(module.state_dict())
        for mine, theirs in zip(smaller.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)
        return smaller

    kept_K = torch.arange(heads.width - groups * heads.block, heads.width, device="cpu")
    return can_go(random_copy([heads]), [kept_K], args, kwargs, as_built)


def _check(
    model: nn.Module,
    layers: Sequence[DecoderLayer],
    heads: Heads,
    groups: int,
    found: dict[str, list[Neurons]],
    smaller: nn.Module,
) -> None:
    """Refuse a model in which something else depends on the number of heads, or nothing was found."""
    sliced = skeleton(model)
    there, modules = dict(own_modules(sliced)), dict(own_modules(model))
    twins = {module: there[name] for name, module in modules.items()}
    every = [each.within(twins) for of_layer in found.values() for each in of_layer]
    keep_neurons(every, [torch.arange(groups * each.block, device="cpu") for each in every])
    is_, says = shapes_of(sliced), shapes_of(smaller)
    if every and is_ == says:
        return
    what = f"{heads.heads} heads of {heads.size} numbers in {heads.groups} key/value groups"
    name = next((name for name in [*is_, *says] if is_.get(name) != says.get(name)), None)
    layer = next((layer for layer in layers if name and name.startswith(f"{layer.name}.")), layers[0])
    differs = f"{name} is {says.get(name)} with {groups} groups, by its config; " if name else ""
    raise ValueError(
        f"the attention of {type(model).__name__} is of no known form for {what}: no matrix reads them that others "
        f"beside it write; {differs}{seen_in(layer)}; leave attention_keep at 1"
    )
