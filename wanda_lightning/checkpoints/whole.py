"""Whether all weights of a model were loaded, so that none is a random number."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from wanda_lightning.model.offload import shapes_on_disk


def check_whole(model: nn.Module, info: Mapping[str, Any], pretrained: str, any_size: bool = False) -> None:
    """Refuse a model whose files lack weights that its config describes, or have them in other shapes.

    Args:
        model: The model, as transformers has loaded it. Of what it left on disk it has not compared the shapes.
        info: What transformers says of the loading.
        pretrained: The name of the model.
        any_size: Whether the user wants weights of other shapes to be random.

    Raises:
        ValueError: If weights would be random, with their names.
    """
    if missing := sorted({name for name, _ in model.named_parameters()}.intersection(info["missing_keys"])):
        raise ValueError(
            f"{pretrained} lacks {len(missing)} of the weights that its config describes, which would be random: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    found = [*info["mismatched_keys"], *(each for each in shapes_on_disk(model) if each[1] != each[2])]
    if found and not any_size:
        name, stored, wanted = min(found)
        raise ValueError(
            f"{pretrained} has {len(found)} weights of other shapes than its config says: {name} is {tuple(stored)} in "
            f"its files, and {tuple(wanted)} by its config"
        )
