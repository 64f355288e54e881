"""Depth pruning as a Lightning callback."""

from functools import partial

from torch import nn
from typing_extensions import override

from wanda_lightning.arguments import plain
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.callbacks.shape_pruning import ShapePruning
from wanda_lightning.engine.depth import LayerChoice, check_number, check_settings, prune_depth
from wanda_lightning.engine.shortening import Shortening
from wanda_lightning.report.shrinking import ShrinkReport


class DepthPruning(ShapePruning):
    """Takes whole decoder layers out before training: what is left is an ordinary, smaller model.

    See :func:`wanda_lightning.prune_depth` for the choice of the layers. Works with any LightningModule that holds a
    Hugging Face causal language model in memory, alone or with DDP; beside :class:`wanda_lightning.WidthPruning`, and
    before callbacks that prune weights to zero. Fine-tune, best with distillation: what is left is worth much less
    without it.

    Args:
        layers: How many layers go, fewer than there are.
        choice: ``influence`` (ShortGPT, arXiv:2403.03853), ``contiguous`` (arXiv:2403.17887) or ``loss``.
        layer_list: Name of the list of decoder layers, such as ``model.layers``, where the rule for finding it fails.
        num_samples: How many sequences to take where calibration uses the train dataloader.
        activations: Where the activations of the calibration set wait: on the ``device``, ``cpu`` or ``disk``.
        overwrite: Replace the results in the folder also if they are of other settings.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        layers: int = 4,
        choice: LayerChoice = "influence",
        layer_list: str | None = None,
        num_samples: int = 128,
        activations: Place = "device",
        overwrite: bool = False,
    ) -> None:
        layers = plain(layers)
        check_settings(layers, choice, activations)
        super().__init__(num_samples, overwrite, layers=layers, choice=choice)
        self.prune = partial(prune_depth, **self.settings, layer_list=layer_list, activations=activations)
        self.layer_list = layer_list

    @override
    def check(self, model: nn.Module) -> None:
        """Refuse a model that has too few layers."""
        check_number(self.settings["layers"], Shortening.of(model, self.layer_list))

    @override
    def reshape(self, model: nn.Module, report: ShrinkReport) -> None:
        """Take out the layers that the report does not keep."""
        plan = Shortening.of(model, self.layer_list)
        if gone := set(range(len(plan.layers))) - set(report.kept):
            plan.apply(gone)
