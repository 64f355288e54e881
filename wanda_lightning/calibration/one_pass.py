"""One visit to a layer: its linears are pruned while the calibration set runs through it.

All batches advance together. Each stops before the next linear that is to be pruned, and its input is added to a
statistic. When the last batch has arrived, the linear is pruned, and all go on through the pruned one: the order that
GPTQ's users know as ``true_sequential`` (Frantar et al. 2022, arXiv:2210.17323), without a forward of its own for every
linear. Linears that are fed by the same tensor are pruned with one statistic, each when the first batch reaches it.

Shapes: B batch, T tokens, I in features.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, NoReturn
from weakref import ReferenceType, ref

from torch import Tensor, nn

from wanda_lightning.calibration.both_streams import BothStreams
from wanda_lightning.calibration.calibrated_layer import CalibratedLayer, check_statistics
from wanda_lightning.calibration.collector import by_module
from wanda_lightning.calibration.hidden_states import HiddenStates
from wanda_lightning.calibration.resumable import Resumable, pause
from wanda_lightning.calibration.weight_products import WeightProducts
from wanda_lightning.model.experts import expert_inputs
from wanda_lightning.model.hooks import before_calls
from wanda_lightning.model.linears import EXPERT_OUTPUT, PrunableLinear
from wanda_lightning.statistics import InputStatistic


class NotOnePassError(Exception):
    """The batches do not stop at the same linears in the same order: the layer has to be visited twice."""


class Part(NamedTuple):
    """Linears that all batches have reached.

    Attributes:
        linears: The linears; they are to be pruned before the next part is asked for.
        statistics: Of their inputs, by name. Linears that share an input come one by one, with the same statistic.
    """

    linears: list[PrunableLinear]
    statistics: dict[str, InputStatistic]


@dataclass
class _Source:
    """A tensor of each batch that feeds linears, and the statistic of it."""

    first: nn.Module  # that it feeds
    statistic: InputStatistic
    inputs: dict[int, ReferenceType[Tensor]] = field(default_factory=dict)  # by number of the batch

    @property
    def is_alive(self) -> bool:
        return any(reference() is not None for reference in self.inputs.values())


class _Stop(NamedTuple):
    """What a batch says when it pauses before a module."""

    module: nn.Module
    source: _Source | None = None  # known already: nobody else is waited for


class OnePass:
    """Takes all batches through a layer, once.

    Args:
        inputs: The layer and what enters it.
        statistic: What is gathered of the inputs of its linears.
        needs_outputs: Whether the batches are to go on to the end of the layer, behind its last linear.
    """

    def __init__(self, inputs: CalibratedLayer, statistic: type[InputStatistic], needs_outputs: bool) -> None:
        self._inputs = inputs
        self._new = inputs.new_statistics(statistic)
        self._needs_outputs = needs_outputs
        self._modules = by_module(inputs.layer.linears)
        self._passed: dict[nn.Module, nn.Module] = {}  # modules that are pruned, each with the first of the same input
        self._sources: list[_Source] = []
        self._calls: dict[int, set[nn.Module]] = {}
        self._stop: nn.Module | None = None  # that batches wait at
        self._arrived: dict[int, list[Any]] = {}  # what enters fused experts, by batch, where they are the stop
        self._batch = 0  # that is running
        self._streams = BothStreams(inputs)

    def parts(self) -> Generator[Part]:
        """Take the batches through; when all are behind the layer, its outputs are what enters the next one.

        Yields:
            Linears that all batches have reached.

        Raises:
            NotOnePassError: If the batches cannot advance together.
            ValueError: If an input is NaN or infinite.
        """
        inputs = self._inputs
        if some := [x.name for x in inputs.layer.linears if x.may_be_passed_by]:
            raise NotOnePassError(f"a router decides which batches reach {some[0]}")
        if some := [x.name for x in inputs.layer.linears if x.projection is not None]:
            raise NotOnePassError(f"{some[0]} is packed with others that may have other inputs")
        batches = [Resumable(partial(inputs.passed_on, number)) for number in range(len(inputs.hidden_BTD))]
        outputs = HiddenStates(inputs.hidden_BTD.place)
        try:
            with before_calls(self._modules, self._called), self._streams.watched(lambda: self._batch):
                while len(self._passed) < len(self._modules) or (self._needs_outputs and not len(outputs)):
                    for number, batch in enumerate(batches):
                        yield from self._advance(number, batch)
                        if batch.is_done:
                            outputs.append(batch.take_result())
                    if outputs and self._stop:
                        raise NotOnePassError("not all batches reach the same linears")
                    yield from self._reached()
                if not self._needs_outputs:  # a linear that is called again behind the last stop would not be seen
                    yield from self._advance(0, batches[0])
        finally:
            for batch in batches:
                batch.give_up()
        if self._needs_outputs:
            inputs.advance(outputs)

    def _advance(self, number: int, batch: Resumable) -> Iterator[Part]:
        """Let a batch run to the next linear whose input is new, or to its end."""
        self._batch = number
        while (stop := self._resumed(number, batch)) is not None and stop.source is not None:
            linear = self._modules[stop.module][0]
            self._passed[stop.module] = stop.source.first
            yield Part([linear], {linear.name: stop.source.statistic})
            self._batch = number

    def _resumed(self, number: int, batch: Resumable) -> Any:
        """Let a batch run; the first shows at once where a linear is used without a call, which stops nobody."""
        with WeightProducts(self._modules, _not_called) if number == 0 else nullcontext():
            return batch.resume()

    def _reached(self) -> Iterator[Part]:
        """Yield the linears of the module that all batches wait at."""
        if self._stop is None:
            if unreached := self._modules.keys() - self._passed.keys():
                raise NotOnePassError(f"{self._modules[unreached.pop()][0].name} was not called")
            return
        linears = self._modules[self._stop]
        self._passed[self._stop] = self._stop
        if linears[0].expert is None:
            yield _checked({linears[0].name: self._sources[-1].statistic}, linears)
        else:
            yield from self._experts(linears)
        self._stop = None
        self._arrived.clear()
        self._sources = [source for source in self._sources if source.is_alive]

    def _experts(self, linears: Sequence[PrunableLinear]) -> Iterator[Part]:
        """Yield the matrices of fused experts: first those that see the hidden states, then those behind them."""
        for behind in (False, True):
            some = [linear for linear in linears if (linear.parameter == EXPERT_OUTPUT) == behind]
            if some:
                statistics = {linear.name: self._new.of(linear) for linear in some}
                for number, arguments in self._arrived.items():
                    for linear, x_TI in expert_inputs(some, arguments, self._inputs.real[number].mask_BT):
                        statistics[linear.name].update(x_TI)
                yield _checked(statistics, some)

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Stop a batch before a module that is still to be pruned."""
        calls = self._calls.setdefault(self._batch, set())
        if module in calls:
            raise NotOnePassError(f"{self._modules[module][0].name} is called several times")
        calls.add(module)
        linear, inputs = self._modules[module][0], [*args, *kwargs.values()]
        source = None if linear.expert is not None else self._source_of(inputs[0])
        if module in self._passed:
            if source is None or source.first is not self._passed[module]:
                raise NotOnePassError(f"{linear.name} does not share its input in every batch")
        elif source is not None:
            if not self._new.are_one(linear.name, self._modules[source.first][0].name):
                raise NotOnePassError(f"{linear.name} shares its input in some calls of the layer only")
            pause(_Stop(module, source))
        else:
            self._arrive(module, linear, inputs)
            fill = self._set_aside(linear, inputs[0])
            pause(_Stop(module))
            fill()

    def _set_aside(self, linear: PrunableLinear, x: Tensor) -> Callable[[], None]:
        """Move what waits to where the hidden states are; what enters fused experts is still to be read."""
        if linear.expert is not None:
            return lambda: None
        return self._inputs.hidden_BTD.set_aside(x, f"waiting-{self._batch}")

    def _source_of(self, x: Tensor) -> _Source | None:
        """Return the stop that a tensor of the running batch has been counted at."""
        for source in self._sources:
            reference = source.inputs.get(self._batch)
            if reference is not None and reference() is x:
                return source
        return None

    def _arrive(self, module: nn.Module, linear: PrunableLinear, inputs: list[Any]) -> None:
        """Count the input of a batch at a stop."""
        is_first = self._stop is None
        self._stop = self._stop or module
        if self._stop is not module:
            raise NotOnePassError(f"{linear.name} is reached by some batches where others reach another linear")
        if linear.expert is not None:
            self._arrived[self._batch] = inputs
            return
        if is_first:
            self._sources.append(_Source(module, self._new.of(linear)))
        source = self._sources[-1]
        self._streams.count(source.statistic, linear, inputs[0], self._batch)
        source.inputs[self._batch] = ref(inputs[0])


def _not_called(module: nn.Module, x: Tensor) -> NoReturn:
    raise NotOnePassError(f"the weight of a {type(module).__name__} is used without a call")


def _checked(statistics: dict[str, InputStatistic], linears: Sequence[PrunableLinear]) -> Part:
    check_statistics(statistics)
    return Part(list(linears), statistics)
