"""What it takes to take whole decoder layers out of a model: checked before anything changes, then done at once."""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

from torch import nn

from wanda_lightning.engine.reshaping import check_can_change_shape, described
from wanda_lightning.model.configuration import (
    Path,
    change,
    find_numbers,
    set_number,
    shapes_of,
    skeleton,
    take_over,
)
from wanda_lightning.model.decoder import DecoderLayer, decoder_layers
from wanda_lightning.model.linears import own_modules

PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Shortening:
    """How layers are taken out of a model.

    Attributes:
        model: The model.
        layers: Its decoder layers.
        described: The model by its config alone, on the meta device.
    """

    model: nn.Module
    layers: list[DecoderLayer]
    described: nn.Module

    @classmethod
    def of(cls, model: nn.Module, layer_list: str | None = None) -> "Shortening":
        """Look at a model.

        Args:
            model: The model.
            layer_list: Name of the list of decoder layers, where the rule for finding it fails.

        Returns:
            What is known of it; nothing has changed.

        Raises:
            ValueError: If its parameters cannot be replaced, or its config describes another model.
        """
        check_can_change_shape(model)
        layers = decoder_layers(model, targets=["*"], layers=layer_list)
        if len(lists := {layer.list_name: layer for layer in layers}) > 1:
            raise ValueError(f"the decoder layers are in several lists ({', '.join(lists)}): none of them can go alone")
        return cls(model, layers, described(model))

    @contextmanager
    def without(self, gone: Collection[int]) -> Iterator[None]:
        """Take layers out of the model for a while; nothing is copied, and all is as it was afterwards."""
        parts = [*self.model.modules(), *_configs(self.model)]
        before = [(part, {**vars(part)}) for part in parts]
        layers = _layer_list(self.model, self.layers[0].list_name)
        modules = {**layers._modules}
        try:
            self.apply(gone)
            yield
        finally:
            for part, attributes in before:
                vars(part).update(attributes)
            layers._modules = modules

    def apply(self, gone: Collection[int]) -> dict[str, tuple[int, int]]:
        """Take layers out, number the others anew, and let the config say so.

        Args:
            gone: Numbers of layers, which have to be such that the rest can be described.

        Returns:
            The number that the config says of layers, before and after, by its name.
        """
        model, name = self.model, self.layers[0].list_name
        path, numbers, after = self._without(gone)
        _cut_lists(model.config, path[:-1], len(self.layers), gone)
        set_number(model, path, *numbers)
        layers, as_built = _layer_list(model, name), _layer_list(after, name)
        _delete(layers, gone)
        for old, new in _renumbered(len(self.layers), gone):
            built = dict(own_modules(as_built[new]))
            for part, module in own_modules(layers[new]):
                for attribute, value in [*vars(module).items()]:
                    if type(value) is int and value == old and vars(built[part]).get(attribute) == new:
                        setattr(module, attribute, new)
        take_over(model, self.described, after, apart_from=name)
        return {".".join(path): numbers}

    def _without(self, gone: Collection[int]) -> tuple[Path, tuple[int, int], nn.Module]:
        """Describe the model without some layers.

        Returns:
            Where its config says how many layers there are, this number before and after, and the shorter model on the
            meta device.

        Raises:
            ValueError: If the config cannot describe it as it would be.
        """
        model, name, before = self.model, self.layers[0].list_name, len(self.layers)
        shorter = copy.deepcopy(self.described)
        _delete(_layer_list(shorter, name), gone)
        found = find_numbers(
            model,
            {before: before - len(gone)},
            shapes_of(shorter),
            also=lambda config, path: _cut_lists(config, path[:-1], before, gone),
        )
        ((path, numbers),) = found.items()
        config = copy.deepcopy(model.config)
        _cut_lists(config, path[:-1], before, gone)
        change(config, path, *numbers)
        after = skeleton(model, config)
        was, is_now = _layer_list(self.described, name), _layer_list(after, name)
        for old, new in _renumbered(before, gone):
            if difference := _difference(was[old], is_now[new], old, new):
                raise ValueError(f"layer {old} would be built otherwise as layer {new}: {difference}")
        return path, numbers, after


def _delete(layers: nn.ModuleList, gone: Collection[int]) -> None:
    for number in sorted(gone, reverse=True):
        del layers[number]


def _renumbered(number: int, gone: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yield the old and the new number of every layer that stays."""
    stay = [layer for layer in range(number) if layer not in gone]
    yield from zip(stay, range(len(stay)), strict=True)


def _layer_list(model: nn.Module, name: str) -> nn.ModuleList:
    return cast(nn.ModuleList, dict(own_modules(model))[name])


def _configs(model: nn.Module) -> list[Any]:
    """List the configs that a model and its modules hold, and those within them."""
    found = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")]
    for config in found:
        found += [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return [*{id(config): config for config in found}.values()]


def _cut_lists(config: Any, path: Path, number: int, gone: Collection[int]) -> None:
    """Cut what a config says layer by layer, such as ``layer_types``: its lists that are as long, but for tokens."""
    owner = reduce(getattr, path, config)
    for name, value in [*vars(owner).items()]:
        if isinstance(value, list | tuple) and len(value) == number and not name.endswith(("_token_id", "_token_ids")):
            setattr(owner, name, type(value)(each for layer, each in enumerate(value) if layer not in gone))


def _difference(before: nn.Module, after: nn.Module, old: int, new: int) -> str:
    """Say how a layer differs from what it is to be, apart from its number; empty if it does not."""
    built = dict(own_modules(after))
    for name, module in own_modules(before):
        other = built.get(name)
        if type(other) is not type(module):
            return f"{name or 'it'} is a {type(module).__name__}, not a {type(other).__name__}"
        for attribute, value in vars(module).items():
            changed = vars(other).get(attribute)
            is_number = type(value) is int and (value, changed) == (old, new)
            if isinstance(value, PLAIN) and not is_number and value != changed:
                return f"{name}.{attribute} is {value!r}, not {changed!r}".lstrip(".")
    return ""
