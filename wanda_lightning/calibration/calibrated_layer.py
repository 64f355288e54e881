"""A decoder layer with everything that enters it. Shapes: B batch, T tokens, D hidden size."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from wanda_lightning.calibration.calls import hidden_states_of
from wanda_lightning.calibration.collector import Collector, by_module
from wanda_lightning.calibration.dense_inputs import DenseInputs
from wanda_lightning.calibration.earlier_calls import NewStatistics
from wanda_lightning.calibration.hidden_states import HiddenStates
from wanda_lightning.calibration.parts_that_fit import parts_that_fit
from wanda_lightning.calibration.stream import Stream
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.held import Held, held_before
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.statistics import InputHessian, InputNorm, InputStatistic

OVERFLOW = (
    "the model overflows on this calibration set; load it in bfloat16 or float32, or check its weights and the batches"
)


class CalibratedLayer:
    """A decoder layer with everything that enters it, batch by batch.

    Args:
        layer: The decoder layer.
        stream: All batches, before it.
        memory: Bytes that Hessians may take at a time, where the layer is not always in memory; None for no limit.
        is_last: Whether no layer of its stack follows, so that nothing needs its outputs.
        dense_BTD: What the layer gives in the dense model, one tensor (B, T, D) a batch, where that is wanted.
        dense_inputs: What enters the layer's linears in the dense model, where that is wanted.
        earlier: What was gathered in earlier calls of the layer, by linear name; later statistics go on from there.

    Attributes:
        hidden_BTD: The hidden states entering it, one tensor a batch.
        real: Which tokens are real, a batch.
        has_advanced: Whether ``hidden_BTD`` holds what enters the next layer.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        stream: Stream,
        memory: int | None = None,
        is_last: bool = False,
        dense_BTD: HiddenStates | None = None,
        dense_inputs: DenseInputs | None = None,
        earlier: Mapping[str, InputStatistic] | None = None,
    ) -> None:
        self.layer = layer
        self._stream = stream
        self.hidden_BTD = stream.hidden_BTD
        self.real = stream.real
        self.memory = memory
        self.is_last = is_last
        self.dense_BTD = dense_BTD
        self.dense_inputs = dense_inputs
        self._earlier = earlier or {}
        self.has_advanced = False

    def output(self, batch: int) -> Tensor:
        """Run the layer as it is now; return the hidden states (B, T, D) of a batch behind it."""
        return hidden_states_of(self._run(batch))

    def outputs(self) -> Iterator[Tensor]:
        """Run the layer as it is now; yield its hidden states (B, T, D) a batch at a time."""
        return (self.output(batch) for batch in range(len(self.hidden_BTD)))

    def passed_on(self, batch: int) -> Tensor:
        """Run the layer as the model is to go on behind it; return the hidden states (B, T, D) of a batch."""
        return self._stream.take(batch, self._run(batch))

    def advance(self, outputs: HiddenStates | None = None) -> None:
        """Make the inputs of the next layer of this one's: what it gives as it is now, or what it was to pass on."""
        if outputs is not None:
            self.hidden_BTD.replace(outputs)
        elif not self.has_advanced:
            for batch in range(len(self.hidden_BTD)):
                self.hidden_BTD[batch] = self.passed_on(batch)
        self.has_advanced = True

    def waiting(self) -> dict[str, Held]:
        """Run the layer on the largest batch, and tell what is held where all batches wait before one linear.

        Returns:
            Bytes by linear, beside the hidden states that are held anyway.
        """
        sizes = [x.numel() for x in self.hidden_BTD.shapes]
        largest, modules = sizes.index(max(sizes)), by_module(self.layer.linears)
        times = sum(sizes) / sizes[largest]
        found = held_before(modules, lambda: self.passed_on(largest))
        return {modules[each][0].name: Held(*(round(times * size) for size in held)) for each, held in found.items()}

    def new_statistics(self, statistic: type[InputStatistic]) -> NewStatistics:
        """Return what makes statistics of a kind for the layer's linears."""
        return NewStatistics(statistic, self._earlier)

    def parts(self, statistic: type[InputStatistic]) -> list[list[PrunableLinear]]:
        """Split the pruned linears so that the statistics of each part fit in memory together.

        Args:
            statistic: The kind of statistic.

        Returns:
            The linears of each pass over the calibration set. Linears that share an input are in one.
        """
        linears = self.layer.linears
        if not linears or self.memory is None or not issubclass(statistic, InputHessian):
            return [linears] if linears else []
        shared = self.collect(InputNorm, batches=1)
        groups: dict[object, list[PrunableLinear]] = {}
        for linear in linears:
            # Which experts of a list are called differs from batch to batch: they stay together.
            alike = linear.experts if linear.may_be_passed_by else id(shared[linear.name])
            groups.setdefault(alike, []).append(linear)
        sizes = [
            4 * sum({id(shared[linear.name]): linear.weight_OI.shape[1] ** 2 for linear in group}.values())
            for group in groups.values()
        ]
        return parts_that_fit([*groups.values()], sizes, self.memory)

    def collect(
        self,
        statistic: type[InputStatistic],
        linears: list[PrunableLinear] | None = None,
        batches: int | None = None,
        advance: bool = False,
        is_last_call: bool = True,
    ) -> dict[str, InputStatistic]:
        """Run the layer and gather a statistic of every pruned linear's inputs; padding does not count.

        Args:
            statistic: The kind of statistic.
            linears: Those of the layer whose inputs are wanted. Default: all that are pruned.
            batches: Use the first so many only. Default: all.
            advance: Whether nobody changes the layer, so that what it gives here is what enters the next one.
            is_last_call: Whether the model does not call the layer again, with linears that it passes by here.

        Returns:
            The statistics by linear name. Linears fed by the same tensor share one object. The statistic of an expert
            that got no tokens is empty: its ``tokens`` are 0.

        Raises:
            ValueError: If an input is NaN or infinite, or a linear was never called that no router could pass by.
        """
        linears = self.layer.linears if linears is None else linears
        collector = Collector(self.new_statistics(statistic), linears, to_the_end=advance)
        for batch, real in enumerate(islice(self.real, batches)):
            with collector.batch(tuple(self.hidden_BTD.shapes[batch].shape), real):
                out = self._run(batch)
            if advance:
                self.hidden_BTD[batch] = self._stream.take(batch, out)
        self.has_advanced = self.has_advanced or advance
        statistics = collector.statistics(is_last_call)
        check_statistics(statistics)
        return statistics

    def _run(self, batch: int) -> Any:
        """Call the layer as the model does."""
        return self._stream.call(self.layer, batch, self.hidden_BTD[batch])


def check_statistics(statistics: Mapping[str, InputStatistic]) -> None:
    """Refuse inputs that are NaN or infinite.

    Args:
        statistics: The statistics, by the name of the linear.

    Raises:
        ValueError: If there are such, with the linear's name.
    """
    for name, gathered in statistics.items():
        if not gathered.is_finite:
            raise ValueError(f"the inputs of {name} are NaN or infinite: {OVERFLOW}")
