"""What every change of a model's shapes begins and ends with: what is refused, and what became of its size."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from wanda_lightning.engine.checks import refuse_sharded
from wanda_lightning.engine.left_as_found import left_as_found
from wanda_lightning.model.configuration import shapes_of, skeleton
from wanda_lightning.model.language_model import is_of_transformers
from wanda_lightning.model.linears import own_parameters
from wanda_lightning.report.shrinking import ShrinkReport


def check_can_change_shape(model: nn.Module, keeps: str = "its shapes") -> None:
    """Refuse a model whose parameters cannot be replaced by smaller ones, or rearranged together.

    Args:
        model: The model.
        keeps: What such a model keeps, for the message.

    Raises:
        ValueError: If it is none of transformers, or weights are not in memory, sharded, adapted, or shared by several
            modules of the decoder.
    """
    if not is_of_transformers(model):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers, and keeps {keeps}: if it holds one, give "
            "that, such as module.model"
        )
    refuse_sharded(model)
    if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{len(absent)} weights are not in memory ({absent[0]}, ...), and a model that is streamed from disk keeps "
            f"{keeps}: load it without stream or device_map"
        )
    if adapted := [name for name, module in model.named_modules() if "base_layer" in module._modules]:
        raise ValueError(
            f"{len(adapted)} linears have adapters ({adapted[0]}, ...), and an adapted model keeps {keeps}: change it "
            "before adapters are added"
        )
    names = defaultdict(list)
    embeddings = {p for module in _embeddings(model) for p in module.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter not in embeddings:
            names[parameter].append(name)
    if shared := next((each for each in names.values() if len(each) > 1), None):
        raise ValueError(
            f"{' and '.join(shared[:3])} are one parameter: a model that uses matrices several times keeps {keeps}"
        )


def described(model: nn.Module) -> nn.Module:
    """Build a model from its config alone, on the meta device.

    Args:
        model: The model.

    Returns:
        The model without values.

    Raises:
        ValueError: If the config is that of another model.
    """
    empty = skeleton(model)
    has, says = shapes_of(model), shapes_of(empty)
    if has != says:
        name = next(name for name in [*has, *says] if has.get(name) != says.get(name))
        raise ValueError(
            f"the config describes another model: {name} is {has.get(name, 'not there')}, and by the config "
            f"{says.get(name, 'not there')}; a smaller model could not be loaded again"
        )
    return empty


@contextmanager
def reported(model: nn.Module, report: ShrinkReport) -> Iterator[None]:
    """Write into a report what a model's size was and became, and how long that took; all else is left as found."""
    started, before = time.perf_counter(), _size(model)
    with left_as_found(model):
        yield
    report.parameters, report.bytes = zip(before, _size(model), strict=True)
    report.seconds = time.perf_counter() - started


def _size(model: nn.Module) -> tuple[int, int]:
    """Count the parameters of a model and their bytes; shared ones count once."""
    parameters = own_parameters(model)
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input and output embeddings, which are often tied."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [module for get in getters if get is not None and (module := get()) is not None]
