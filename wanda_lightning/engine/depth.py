"""Depth pruning: whole decoder layers go, those that change the hidden states or the loss least."""

from collections.abc import Iterable
from typing import Literal

from torch import nn

from wanda_lightning.arguments import one_of, plain, whole_number
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.hidden_states import Place, check_activations
from wanda_lightning.engine.layer_choice import LayerChooser
from wanda_lightning.engine.loop import Progress
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.reshaping import reported
from wanda_lightning.engine.shortening import Shortening
from wanda_lightning.model.language_model import uncompiled
from wanda_lightning.report.shrinking import ShrinkReport

LayerChoice = Literal["influence", "contiguous", "loss"]
FIGURES = {"influence": "influence", "contiguous": "angle", "loss": "loss without it"}


def prune_depth(
    model: nn.Module,
    calibration: Iterable[Batch],
    layers: int = 4,
    *,
    choice: LayerChoice = "influence",
    layer_list: str | None = None,
    activations: Place = "device",
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> ShrinkReport:
    """Take whole decoder layers out of a model, so that it is an ordinary, shallower model.

    Layers that the config cannot do without, such as a first one that is built in another way, stay; so do those
    without which the model does not run, such as the one whose choice of tokens later ones use. That is tried out on a
    few tokens, with the cache too.

    Args:
        model: A causal language model of transformers; left in the mode, dtype and device it is in.
        calibration: Batches, see :func:`wanda_lightning.prune_model`.
        layers: How many go, >= 0, fewer than there are.
        choice: Which go: ``"influence"``, those that turn the hidden states least, by 1 - cosine of what enters and
            what leaves, mean over tokens (Men et al. 2024, ShortGPT, arXiv:2403.03853, eq. 1); ``"contiguous"``, the
            run of layers that together turn them by the smallest angle (Gromov et al. 2024, arXiv:2403.17887, eq. 7,
            here a mean over all tokens); or ``"loss"``, one by one the layer without which the loss on the batches is
            smallest (Song et al. 2024, SLEB, arXiv:2402.09025), which takes a forward pass of the model for every
            layer each time.
        layer_list: Name of the list of decoder layers, such as ``"model.layers"``, where the rule for it fails.
        activations: Where the activations of the calibration set wait between two layers: ``"device"``, ``"cpu"`` or
            ``"disk"``.
        processes: Where each has a part of the calibration set: ``Processes()``. All of them end with the same model.
        progress: Wraps the iteration over layers, given it and its length, to show how far it is.

    Returns:
        What was done.

    Raises:
        ValueError: If an argument, the model or the calibration set cannot be used; nothing has changed then.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
        >>> model = LlamaForCausalLM(config)
        >>> prune_depth(model, list(torch.randint(0, 100, (4, 2, 16))), layers=1).title
        'num_hidden_layers 3 -> 2'
        >>> len(model.model.layers)
        2
    """
    layers = plain(layers)
    check_settings(layers, choice, activations)
    model, processes = uncompiled(model), processes or Processes.alone()
    report = ShrinkReport("layers", {"layers": layers, "choice": choice}, figure=FIGURES[choice])
    with reported(model, report):
        with processes.together():
            plan = Shortening.of(model, layer_list)
            check_number(layers, plan)
        chooser = LayerChooser(plan, layers, processes, progress or (lambda items, _: items))
        if choice == "loss":
            gone, figures = chooser.by_loss(calibration)
        else:
            gone, figures = chooser.by_angle(calibration, activations, contiguous=choice == "contiguous")
        names = [layer.name for layer in plan.layers]
        report.sizes = plan.apply(gone) if gone else {}
        report.figures = {names[number]: figure for number, figure in figures.items()}
        report.gone = [names[number] for number in sorted(gone)]
        report.kept = [number for number in range(len(names)) if number not in gone]
        report.tokens = chooser.tokens
    return report


def check_settings(layers: int, choice: str, activations: str) -> None:
    """Refuse settings that are out of range.

    Args:
        layers: See :func:`prune_depth`, as all.
        choice: A name.
        activations: A place.

    Raises:
        ValueError: If one is.
    """
    whole_number("layers", layers, 0)
    one_of("choice", choice, LayerChoice)
    check_activations(activations)


def check_number(layers: int, plan: Shortening) -> None:
    """Refuse to take all layers out of a model.

    Args:
        layers: How many are to go.
        plan: Knows how many there are.

    Raises:
        ValueError: If none would be left.
    """
    if layers >= len(plan.layers):
        raise ValueError(
            f"layers={layers} of {len(plan.layers)} decoder layers leaves none: give a number in "
            f"[0, {len(plan.layers)})"
        )
