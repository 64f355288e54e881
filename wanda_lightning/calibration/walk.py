"""The walk over the layers: what enters each layer when those before it are already pruned.

The layers are called one by one, with what the model passes to each of them. That is recorded beforehand, or comes from
runs of the model that wait for what the layers give. A language model has one stack of layers; other models may have
several, and what lies between two is the model's own to run. Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain

from torch import nn

from wanda_lightning.calibration.batches import Batch
from wanda_lightning.calibration.calibrated_layer import CalibratedLayer
from wanda_lightning.calibration.dense_stream import DenseStream
from wanda_lightning.calibration.dry_run import dry_run
from wanda_lightning.calibration.feed import Feed, LanguageModelFeed
from wanda_lightning.calibration.first_look import check_calls_between, look
from wanda_lightning.calibration.handed_on import Probed, check_one_by_one, probe
from wanda_lightning.calibration.hidden_states import Place
from wanda_lightning.calibration.stream import Stream
from wanda_lightning.calibration.waiting import Waiting
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.language_model import uncompiled
from wanda_lightning.model.offload import in_memory, is_offloaded
from wanda_lightning.statistics import InputStatistic


def walk(
    model: nn.Module,
    layers: Sequence[DecoderLayer],
    batches: Iterable[Batch],
    activations: Place = "device",
    with_dense: bool = False,
    feed: Feed | None = None,
    with_dense_inputs: bool = False,
    statistic: type[InputStatistic] | None = None,
) -> Iterator[CalibratedLayer]:
    """Visit the layers in order, each with the inputs that the layers before it give as they are now.

    A layer that the model calls several times is visited at its last call; of the calls before, which go through the
    layers as they are then, a statistic is gathered.

    Whatever the caller does to a layer while it is visited (such as pruning it) shows in the inputs of the next. The
    weights of a layer that is offloaded are in memory while it is visited. Where the layers are of several lists, such
    as those of an encoder and a decoder, the model runs again before each list, up to there.

    Args:
        model: The model; in eval mode, without gradients.
        layers: Its layers, list by list in the order in which they are called.
        batches: Calibration batches; of a language model each is input_ids (B, T) int64, a mapping with ``input_ids``
            and optionally ``attention_mask`` (0 = padding), or a tuple or list that starts with input_ids.
        activations: Where the hidden states wait between two layers: ``"device"``, ``"cpu"`` or ``"disk"``.
        with_dense: Whether the hidden states of the dense model go along: each layer runs once more, as it is before
            it is visited. Behind the first list they begin with what its pruned layers give.
        feed: Runs the model on a batch. Default: as a language model.
        with_dense_inputs: Whether also what enters the linears in the dense model goes along.
        statistic: What is gathered of the inputs of linears in calls of their layer before the last. Default: nothing.

    Yields:
        The layer and what enters it.

    Raises:
        ValueError: If there are no batches, one cannot be fed to the model, or its activations overflow; or if the
            dense model was to go along where not each layer is called once and in turn.
    """
    feed = feed or LanguageModelFeed(uncompiled(model))
    stacks, others = in_stacks(layers), iter(batches)
    if (first := next(others, None)) is None:
        raise ValueError("the calibration set is empty: at least one batch is needed")
    batches = chain([first], others) if len(stacks) == 1 else [first, *others]
    calls = [[*range(len(stack))] for stack in stacks]
    for number, stack in enumerate(stacks):
        modules = [layer.module for layer in stack]
        probed = None if feed.may_hand_on else probe(feed, modules, first)
        # Where the layers are on disk all of them are read for this: only to see in which order they are called.
        if not (probed and (number or is_offloaded(model))):
            calls[number:] = _look(stacks[number:], feed, first, probed)
        if (with_dense or with_dense_inputs) and not all(map(_are_in_turn, calls)):
            raise ValueError(
                "the model does not call each of its layers once and in turn: what the dense layers give is not "
                "known layer by layer, and reconstruction and dense_target need that; leave them out"
            )
        with ExitStack() as streams:
            stream: Stream
            if probed and _are_in_turn(calls[number]):
                stream = dry_run(feed, modules, batches, activations, probed.given)
            else:
                stream = Waiting(feed, modules, batches, activations, calls[number])
            streams.enter_context(closing(stream))
            dense = None
            if with_dense or with_dense_inputs:
                dense = DenseStream(stream.twin(), activations if with_dense_inputs else None)
                streams.enter_context(closing(dense))
            yield from _visits(stack, calls[number], stream, dense, statistic)


def _visits(
    stack: Sequence[DecoderLayer],
    calls: Sequence[int],
    stream: Stream,
    dense: DenseStream | None,
    statistic: type[InputStatistic] | None,
) -> Iterator[CalibratedLayer]:
    """Take a stream through the calls of a stack, and show each layer at its last."""
    earlier: dict[int, dict[str, InputStatistic]] = {}
    for call, index in enumerate(calls):
        layer, is_last = stack[index], call + 1 == len(calls)
        memory = sum(p.nbytes for p in layer.module.parameters()) if is_offloaded(layer.module) else None
        dense_BTD = dense.hidden_BTD if dense else None
        with in_memory(layer.module):
            seen = dense.advance(layer) if dense else None
            step = CalibratedLayer(layer, stream, memory, is_last, dense_BTD, seen, earlier.pop(index, None))
            if index not in calls[call + 1 :]:
                yield step
            elif statistic is not None and layer.linears:
                earlier[index] = step.collect(statistic, advance=True, is_last_call=False)
            if seen:
                seen.drop()
            if not is_last:
                step.advance()
        if not is_last:
            stream.go_on()


def _are_in_turn(calls: Sequence[int]) -> bool:
    """Whether each layer of a stack is called once, one after another."""
    return calls == sorted({*calls})


def in_stacks(layers: Sequence[DecoderLayer]) -> list[list[DecoderLayer]]:
    """Part layers into stacks: those of one list, and every matrix outside of lists for itself."""
    stacks: list[list[DecoderLayer]] = []
    for layer in layers:
        before = stacks[-1][-1] if stacks else None
        if before is None or before.list_name != layer.list_name or layer.is_matrix:
            stacks.append([])
        stacks[-1].append(layer)
    return stacks


def _look(stacks: Sequence[Sequence[DecoderLayer]], feed: Feed, first: Batch, probed: Probed | None) -> list[list[int]]:
    """Try the model on a part of a batch: what is wrong with it is better known before anything is pruned.

    Returns:
        The places of the layers in their list, in the order in which they are called, a list.
    """
    few, modules = feed.first(first), [layer.module for layer in stacks[0]]
    seen = look(stacks, feed, few)
    if probed and _are_in_turn(seen.calls[0]):
        check_one_by_one(modules, probed, seen.hidden_BTD, seen.behind_BTD)
    elif not is_offloaded(feed.model):
        check_calls_between(modules, len(seen.calls[0]), feed, few, seen.behind_BTD)
    return seen.calls
