"""The neurons of a decoder layer's MLPs: which matrices write them, and which one reads them.

The rule names no family. A linear may read neurons if linears beside it, in the same module, have as many outputs as it
has inputs (or twice as many, where gate and up are one matrix). Whether it does is tried out: on a copy of the module
in which some neurons are gone, the outputs have to be those of the module that does not read them. Attention, whose
matrices have such shapes too, fails that.

Shapes: O out features, I in features, K kept neurons, B batch, T tokens.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from wanda_lightning.model.convolutions import is_conv2d
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.hooks import before_calls
from wanda_lightning.model.linears import PrunableLinear, own_modules, prunable_linears
from wanda_lightning.model.neurons import Layout, Neurons, keep_neurons
from wanda_lightning.model.offload import device_of
from wanda_lightning.model.replaced import replaced
from wanda_lightning.precision import full_float32

log = logging.getLogger(__name__)

TWICE: tuple[Layout, ...] = ("halves", "pairs")


@torch.no_grad()
def find_neurons(model: nn.Module, layers: Sequence[DecoderLayer]) -> dict[str, list[Neurons]]:
    """Find the neurons of every decoder layer.

    Args:
        model: The causal language model, in eval mode; run once on a few tokens.
        layers: Its decoder layers.

    Returns:
        The groups of neurons by the name of the layer; layers without an MLP have none.

    Raises:
        ValueError: If no layer has any, with the matrices that were looked at.
    """
    found = those_that_work(model, layers, _candidates, _works)
    if not any(found.values()):
        raise ValueError(
            f"no MLP of a known coupling was found in {type(model).__name__}: no matrix reads neurons that others "
            f"beside it write, one by one; {seen_in(layers[0])}"
        )
    return found


def those_that_work(
    model: nn.Module,
    layers: Sequence[DecoderLayer],
    candidates: Callable[[DecoderLayer], Iterator[list[Neurons]]],
    works: Callable[..., bool],
) -> dict[str, list[Neurons]]:
    """Find those candidates that work, given a call of the module that holds them, by the name of the layer.

    Modules that are built alike are tried once: no token may reach an expert.
    """
    every = [(layer.name, each) for layer in layers for each in candidates(layer)]
    calls = _calls_of(model, {each[0].module for _, each in every})
    known: dict[Any, bool] = {}
    for _, each in every:
        if (kind := _how_built(each)) not in known and each[0].module in calls:
            known[kind] = works(each, *calls[each[0].module])
    found: dict[str, list[Neurons]] = {layer.name: [] for layer in layers}
    for name, each in every:
        if known.get(_how_built(each)):
            found[name] += each
    return found


def seen_in(layer: DecoderLayer) -> str:
    """Say which matrices a layer has, for an error."""
    matrices = [f"{x.name} {tuple(x.weight_OI.shape)}" for x in prunable_linears(layer.module, layer.name)]
    return f"{layer.name} has {', '.join(matrices)}"


def matrices_within(layer: DecoderLayer) -> dict[str, dict[str, list[PrunableLinear]]]:
    """Return the matrices of a layer by the module that holds them and their place in it, one an expert."""
    within: dict[str, dict[str, list[PrunableLinear]]] = {}
    for linear in prunable_linears(layer.module, layer.name):
        if not linear.is_router and not linear.is_thin and not is_conv2d(linear.module):
            holder = linear.parameter_name.rpartition(".")[0]
            holder = holder if linear.expert is not None else holder.rpartition(".")[0]
            within.setdefault(holder, {}).setdefault(_place(linear), []).append(linear)
    return within


def _candidates(layer: DecoderLayer) -> Iterator[list[Neurons]]:
    """Yield what may be neurons by the shapes of matrices in one module; those of fused experts come together."""
    modules = dict(own_modules(layer.module, layer.name))
    for holder, matrices in matrices_within(layer).items():
        for place, readers in matrices.items():
            width = readers[0].weight_OI.shape[1]
            others = {name: linears[0].weight_OI.shape[0] for name, linears in matrices.items() if name != place}
            once = [(name, "once") for name, rows in others.items() if rows == width]
            twice = [[(name, layout)] for layout in TWICE for name, rows in others.items() if rows == 2 * width]
            for writers in ([once] if once else []) + twice:
                yield [
                    Neurons(
                        holder if reader.expert is None else f"{holder}.{reader.expert}",
                        modules[holder],
                        reader,
                        tuple((matrices[name][number], cast(Layout, layout)) for name, layout in writers),
                    )
                    for number, reader in enumerate(readers)
                ]


def _place(linear: PrunableLinear) -> str:
    """Name a matrix within the module that holds it."""
    return linear.parameter if linear.expert is not None else linear.name.rpartition(".")[2]


def _how_built(group: Sequence[Neurons]) -> Any:
    """Tell how a module and its neurons are built; what is alike works alike."""
    first = group[0]
    modules = tuple((name, type(module)) for name, module in own_modules(first.module))
    shapes = tuple((name, tuple(p.shape)) for name, p in first.module.named_parameters())
    return modules, shapes, _place(first.reader), tuple((_place(x), layout) for x, layout in first.writers)


def _calls_of(model: Any, modules: Iterable[nn.Module]) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what modules are called with when the model reads a few tokens."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    embeddings = model.get_input_embeddings()
    ids_BT = torch.arange(min(16, embeddings.weight.shape[0]), device=device_of(embeddings))[None]
    with before_calls(modules, lambda module, args, kwargs: calls.update({module: (args, kwargs)})):
        model(input_ids=ids_BT, use_cache=False)
    return calls


def _works(group: Sequence[Neurons], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Remove half of the neurons from a copy of their module, and see whether it is as if nobody read them."""
    random = torch.Generator().manual_seed(0)
    orders = [torch.randperm(each.width, generator=random, device="cpu") for each in group]
    kept = [order_I[: len(order_I) // 2].sort().values for order_I in orders]
    return can_go(random_copy(group), kept, args, kwargs, lambda module: module)


def random_copy(group: Sequence[Neurons]) -> list[Neurons]:
    """Copy the module of neurons, in float32, its matrices random, so that zeros in the model hide nothing."""
    module = copy.deepcopy(group[0].module).float()
    twins = dict(zip(group[0].module.modules(), module.modules(), strict=True))
    group = [each.within(twins) for each in group]
    random = torch.Generator().manual_seed(0)
    for linear in (linear for each in group for linear in each.linears):
        values_OI = torch.randn(linear.weight_OI.shape, generator=random, device="cpu")
        linear.weight_OI.copy_(values_OI / linear.weight_OI.shape[1] ** 0.5)
    return group


def can_go(
    group: Sequence[Neurons],
    kept: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    as_built: Callable[[nn.Module], nn.Module],
) -> bool:
    """Tell whether a module without some neurons computes what it does when nothing reads them.

    Args:
        group: Neurons of one module, which changes.
        kept: For each, the numbers of those that stay, ascending, (K,).
        args: What the module is called with.
        kwargs: What it is called with by name.
        as_built: Makes of the smaller module the one that its config describes.

    Returns:
        Whether it does.
    """
    module, args, kwargs = group[0].module, _in_float32(args), _in_float32(kwargs)
    try:
        with full_float32(group[0].reader.weight_OI.device):  # autocast would round off what is compared
            whole = _first(module(*args, **kwargs))
            for each, kept_K in zip(group, kept, strict=True):
                gone = torch.ones(each.width, dtype=torch.bool, device="cpu").index_fill_(0, kept_K, 0)
                each.reader.weight_OI[:, gone.to(each.reader.weight.device)] = 0
            unread = _first(module(*args, **kwargs))
            keep_neurons(group, kept)
            with replaced(F, "scaled_dot_product_attention", partial(_attend, F.scaled_dot_product_attention)):
                smaller = _first(as_built(module)(*args, **kwargs))
    except Exception as reason:  # whatever a family's own code makes of a shape that it was not written for
        log.debug("%s does not read neurons: %r", group[0].reader.name, reason)
        return False
    close = 1e-4 * unread.abs().max()
    return smaller.shape == unread.shape and bool(
        (smaller - unread).abs().max() <= close < (whole - unread).abs().max()
    )


def _attend(attend: Callable[..., Tensor], query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Refuse keys of no head: torch 2.11 divides by their number, which ends the process."""
    if not key.numel():
        raise ValueError("its attention has no key left")
    return attend(query, key, *args, **kwargs)


def _in_float32(arguments: Any) -> Any:
    """Convert the floating-point tensors among arguments."""
    return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, arguments)


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple | list) else out
