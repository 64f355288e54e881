"""Width pruning: every MLP loses the same number of neurons, and the model is an ordinary, smaller one.

Shapes: O out features, I in features (the neurons), K kept neurons.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from wanda_lightning.allocation.selection import Selection
from wanda_lightning.arguments import instance_or_none, number_not_below_0, one_of, plain, positive_up_to, whole_number
from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.feed import LanguageModelFeed
from wanda_lightning.calibration.hidden_states import Place, check_activations
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.layer_pruning import put_in_place
from wanda_lightning.engine.loop import Progress, carry_out
from wanda_lightning.engine.narrowing import Narrowing, groups_of, kept_of
from wanda_lightning.engine.neuron_removal import Columns, NeuronChoice, NeuronRemoval
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.reshaping import reported
from wanda_lightning.model.language_model import uncompiled
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.model.neurons import Neurons
from wanda_lightning.report.shrinking import ShrinkReport
from wanda_lightning.sparsity import Unstructured


def prune_width(
    model: nn.Module,
    calibration: Iterable[Batch] | None,
    keep: float = 0.8,
    *,
    choice: NeuronChoice = "obs",
    refit: bool = True,
    multiple: int | None = None,
    shrinkage: float = 0.1,
    attention_keep: float = 1.0,
    layers: str | None = None,
    activations: Place = "device",
    journal: Journal | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> ShrinkReport:
    """Remove neurons from every MLP of a model, so that it is an ordinary model with a smaller intermediate size.

    The neurons of a layer are chosen with what the narrower layers before it give, all of a model as many; and of a
    mixture as many of every expert. What is left of the matrix that reads them is fitted to give what it gave with all
    of them, by least squares (Meng et al. 2024, OSSCAR, arXiv:2403.12983, section 3.3; Ling et al. 2024, SlimGPT,
    arXiv:2412.18110). The parameters are new ones: optimizers are made afterwards.

    Args:
        model: A causal language model of transformers; left in the mode, dtype and device it is in.
        calibration: Batches, see :func:`wanda_lightning.prune_model`. May be None for magnitude without refit.
        keep: Fraction of the neurons that stay, in (0, 1].
        choice: Which go: ``"obs"``, one by one those whose loss the others make up for best; ``"wanda"``, the smallest
            mean over outputs of |W| times the norm of the input (Sun et al. 2023, arXiv:2306.11695); or
            ``"magnitude"``, the smallest mean of |W|; W is the matrix that reads them.
        refit: Whether to fit the matrix that reads the neurons to those that stay.
        multiple: What the number of neurons is rounded to, >= 1. Default: 256 where that is at most a sixteenth of the
            width, else 64, 16, 8 or 1.
        shrinkage: Fraction of each of the Hessian's diagonal entries that is added to itself, >= 0: on few tokens,
            correlations are overrated. Beside it a hundredth of their mean is added.
        attention_keep: Fraction of the key/value groups of attention that stay, in (0, 1], rounded to a whole number of
            them; with a group go the heads of queries that share it. Small models have two or three groups.
        layers: Name of the list of decoder layers, where the rule for finding it fails.
        activations: Where the activations of the calibration set wait between two layers: ``"device"``, ``"cpu"`` or
            ``"disk"``.
        journal: Keeps every finished layer on disk, until its ``remove`` is called. Where it holds layers of the same
            pruning already, it goes on behind them.
        processes: Where each has a part of the calibration set: ``Processes()``. All of them end with the same model.
        progress: Wraps the iteration over layers, given it and its length, to show how far it is.

    Returns:
        What was done.

    Raises:
        ValueError: If an argument, the model or the calibration set cannot be used; nothing has changed then.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
        >>> prune_width(model, list(torch.randint(0, 100, (4, 2, 16))), keep=0.5).title
        'intermediate_size 64 -> 32'
        >>> model.config.intermediate_size
        32
    """
    model, journal, processes = uncompiled(model), journal or Journal.none(), processes or Processes.alone()
    keep, multiple, shrinkage, attention_keep = map(plain, (keep, multiple, shrinkage, attention_keep))
    check_settings(keep, choice, multiple, shrinkage, attention_keep, activations)
    instance_or_none("journal", journal, Journal, 'Journal("folder")')
    if calibration is None and (refit or choice != "magnitude"):
        raise ValueError(
            "the choice and the refit need calibration batches, got None; magnitude without refit does not"
        )
    settings = {"keep": keep, "choice": choice, "refit": refit, "multiple": multiple, "shrinkage": shrinkage}
    settings |= {"attention_keep": attention_keep}
    report = ShrinkReport("neurons", settings, figure="error")
    with reported(model, report):
        with processes.together():
            narrowing = plan_width(model, keep, multiple, attention_keep, layers)
        plan = _plan(narrowing, NeuronRemoval(choice, refit, shrinkage), keep, layers)
        batches = calibration if plan.patterns else None
        with _as_they_were_if_it_fails(plan.linears):
            feed = LanguageModelFeed(model)
            done = carry_out(plan, feed, batches, activations, journal, processes, progress, asked=settings)
        narrowing.apply(_kept(narrowing))
        report.sizes = {".".join(path): (was, is_) for path, (was, is_) in narrowing.numbers.items() if was != is_}
        report.figures = {row.name: row.error for row in done.linears if row.error is not None}
        report.kept = [[*width, kept] for width, kept in narrowing.widths.items()]
        report.tokens = max((row.tokens for row in done.linears if row.tokens), default=None)
    return report


def plan_width(
    model: nn.Module, keep: float, multiple: int | None, attention_keep: float, layers: str | None
) -> Narrowing:
    """Find out what is to be done to a model.

    Args:
        model: The model, in eval mode.
        keep: See :func:`prune_width`, as all.
        multiple: A whole number.
        attention_keep: A fraction.
        layers: A name.

    Returns:
        What is to be done; nothing has changed.
    """
    groups = None if attention_keep == 1 else partial(groups_of, keep=attention_keep)
    return Narrowing.of(model, lambda width: kept_of(width, keep, multiple), layers, groups)


@contextmanager
def _as_they_were_if_it_fails(linears: list[PrunableLinear]) -> Iterator[None]:
    """Put the weights back that were there if the body raises: a model with zeros in all its columns is no use."""
    dense = {linear.name: linear.weight_OI.clone() for linear in linears}
    try:
        yield
    except BaseException:
        put_in_place(linears, dense)
        raise


def _plan(narrowing: Narrowing, method: NeuronRemoval, keep: float, layers: str | None) -> Plan:
    """Say what the matrices that read neurons are pruned to; those of which all stay are left alone."""
    groups = [group for group in narrowing.groups if narrowing.kept(group) < group.width]
    patterns = {group.reader.name: _columns(narrowing, group) for group in groups}
    some = [
        replace(layer, linears=[linear for linear in layer.linears if linear.name in patterns])
        for layer in narrowing.layers
    ]
    selection = Selection(layers=layers)
    return Plan(method=method, pattern=Unstructured(1 - keep), selection=selection, layers=some, patterns=patterns)


def _kept(narrowing: Narrowing) -> dict[str, Tensor]:
    """Find the neurons that the readers still read; where these are fewer than stay, the first of the others, too."""
    kept = {}
    for group in narrowing.groups:
        read_1I = group.reader.weight_OI.any(0, keepdim=True).float()
        kept[group.reader.name] = _columns(narrowing, group).mask(read_1I)[0].nonzero().flatten()
    return kept


def _columns(narrowing: Narrowing, group: Neurons) -> Columns:
    """Say how many columns of the matrix that reads some neurons stay."""
    kept = narrowing.kept(group)
    return Columns(1 - kept / group.width, kept, group.block)


def check_settings(
    keep: float, choice: str, multiple: int | None, shrinkage: float, attention_keep: float, activations: str
) -> None:
    """Refuse settings that are out of range.

    Args:
        keep: See :func:`prune_width`, as all.
        choice: A name.
        multiple: A whole number.
        shrinkage: A fraction.
        attention_keep: A fraction.
        activations: A place.

    Raises:
        ValueError: If one is.
    """
    positive_up_to("keep", keep, 1, "fraction of the neurons")
    positive_up_to("attention_keep", attention_keep, 1, "fraction of the key/value groups")
    one_of("choice", choice, NeuronChoice)
    if multiple is not None:
        whole_number("multiple", multiple, 1)
    number_not_below_0("shrinkage", shrinkage)
    check_activations(activations)
