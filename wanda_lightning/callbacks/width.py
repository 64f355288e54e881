"""Width pruning as a Lightning callback."""

from functools import partial

from torch import nn
from typing_extensions import override

from wanda_lightning.arguments import plain
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.callbacks.shape_pruning import ShapePruning
from wanda_lightning.engine.left_as_found import left_as_found
from wanda_lightning.engine.narrowing import Narrowing
from wanda_lightning.engine.neuron_removal import NeuronChoice
from wanda_lightning.engine.width import check_settings, plan_width, prune_width
from wanda_lightning.report.shrinking import ShrinkReport


class WidthPruning(ShapePruning):
    """Removes neurons from every MLP before training: what is left is an ordinary, smaller model.

    The neurons go whose loss the others make up for best, and the matrix that reads them is fitted anew (OSSCAR,
    arXiv:2403.12983; SlimGPT, arXiv:2412.18110); see :func:`wanda_lightning.prune_width`. Works with any
    LightningModule that holds a Hugging Face causal language model in memory, alone or with DDP. Callbacks that
    prune weights to zero find the smaller model. Fine-tune, best with distillation: what is left is worth much less
    without it.

    Args:
        keep: Fraction of the neurons that stay, in (0, 1].
        choice: ``obs``, ``wanda`` or ``magnitude``.
        refit: Whether to fit the matrix that reads the neurons to those that stay.
        multiple: What the number of neurons is rounded to. Default: 256 where that is at most a sixteenth of the width,
            else 64, 16, 8 or 1.
        shrinkage: Fraction of each of the Hessian's diagonal entries that is added to itself, >= 0.
        attention_keep: Fraction of the key/value groups of attention that stay, in (0, 1], each with the heads of
            queries that share it. Small models have two or three groups.
        layers: Name of the list of decoder layers, such as ``model.layers``, where the rule for finding it fails.
        num_samples: How many sequences to take where calibration uses the train dataloader.
        activations: Where the activations of the calibration set wait: on the ``device``, ``cpu`` or ``disk``.
        overwrite: Replace the results in the folder also if they are of other settings.
        resume: Keep finished layers in the folder until the model is smaller, and go on behind those of a run that was
            cut off. False: start over.

    Raises:
        ValueError: If a setting is out of range.

    Example::

        module = CausalLM(name, distillation=Distillation())
        Trainer(callbacks=[WidthPruning(keep=0.8)], max_steps=200).fit(module, data)
    """

    def __init__(
        self,
        keep: float = 0.8,
        choice: NeuronChoice = "obs",
        refit: bool = True,
        multiple: int | None = None,
        shrinkage: float = 0.1,
        attention_keep: float = 1.0,
        layers: str | None = None,
        num_samples: int = 128,
        activations: Place = "device",
        overwrite: bool = False,
        resume: bool = True,
    ) -> None:
        keep, multiple, shrinkage, attention_keep = map(plain, (keep, multiple, shrinkage, attention_keep))
        check_settings(keep, choice, multiple, shrinkage, attention_keep, activations)
        sizes = {"keep": keep, "multiple": multiple, "attention_keep": attention_keep}
        super().__init__(num_samples, overwrite, **sizes, choice=choice, refit=refit, shrinkage=shrinkage)
        self.prune = partial(prune_width, **self.settings, layers=layers, activations=activations)
        self.keep, self.multiple, self.attention_keep, self.layers = keep, multiple, attention_keep, layers
        self.resume = resume

    @override
    def check(self, model: nn.Module) -> None:
        """Refuse a model that cannot be made narrower."""
        with left_as_found(model):
            plan_width(model, self.keep, self.multiple, self.attention_keep, self.layers)

    @override
    def reshape(self, model: nn.Module, report: ShrinkReport) -> None:
        """Make the MLPs and the attention as narrow as the report says."""
        widths = {width: kept for width, block, kept in report.kept if block == 1}
        groups = {width // block: kept // block for width, block, kept in report.kept if block > 1}
        of_heads = (lambda number: groups.get(number, number)) if groups else None
        with left_as_found(model):
            Narrowing.of(model, lambda width: widths.get(width, width), self.layers, of_heads).apply_first()
