"""A free permutation: neurons stand in the order in which the N:M pattern of the matrix that reads them loses least.

The rows of the matrices that write the neurons of an MLP, and their biases, and the columns of the one that reads them
move together, before any of them is pruned: the layer gives what it gave, up to the order in which its sums are
rounded. (Channel permutation: Pool and Yu, NeurIPS 2021; for language models RIA, Zhang et al., ICLR 2024.)

Shapes: O out features, I in features (the neurons).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from wanda_lightning.calibration.calibrated_layer import CalibratedLayer
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.processes import Processes, share_statistics
from wanda_lightning.engine.reshaping import check_can_change_shape
from wanda_lightning.model.coupling import find_neurons
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.language_model import is_language_model
from wanda_lightning.model.neurons import Neurons, reorder_neurons
from wanda_lightning.solvers.grouping import grouped
from wanda_lightning.sparsity import SemiStructured
from wanda_lightning.statistics import InputNorm, InputStatistic


def with_neurons(plan: Plan, model: nn.Module) -> Plan:
    """Find the neurons that may stand in another order.

    Args:
        plan: What is asked for.
        model: The model, in eval mode.

    Returns:
        The plan, with the neurons that a matrix with an N:M pattern reads.

    Raises:
        ValueError: If the model is none whose neurons can move, or none of them would.
    """
    check_can_change_shape(model, "the order of its neurons")
    if not is_language_model(model):
        raise ValueError(f"permute finds the MLPs of language models, got {type(model).__name__}: leave permute out")
    neurons = {
        name: [each for each in found if isinstance(plan.patterns.get(each.reader.name), SemiStructured)]
        for name, found in find_neurons(model, plan.layers).items()
    }
    if not any(neurons.values()):
        raise ValueError(
            "no matrix that reads the neurons of an MLP is to be pruned to an N:M pattern: leave permute out"
        )
    layers = [
        replace(layer, moved={name: p for each in neurons[layer.name] for name, p in each.parameters.items()})
        for layer in plan.layers
    ]
    return replace(plan, layers=layers, neurons=neurons)


@contextmanager
def permuted(layer: DecoderLayer, inputs: CalibratedLayer | None, plan: Plan, processes: Processes) -> Iterator[None]:
    """Let the neurons of a layer stand in a better order; in the one they had if an error follows.

    Args:
        layer: The layer, dense.
        inputs: What enters it; None for methods without calibration.
        plan: Has the neurons; nothing is done where it has none.
        processes: Those that have the other parts of the calibration set; all of them end with the same order.
    """
    neurons = plan.neurons.get(layer.name, [])
    statistics: dict[str, InputStatistic] = {}
    readers = [each.reader for each in neurons]
    if readers and inputs is not None and plan.statistic is not None:
        with processes.together():
            statistics = inputs.collect(InputNorm, readers)
        share_statistics(statistics, readers, processes)
    orders = [processes.send(0, _order(each, statistics.get(each.reader.name), plan)) for each in neurons]
    _reorder(neurons, orders, inputs)
    try:
        yield
    except BaseException:
        _reorder(neurons, [order_I.argsort() for order_I in orders], inputs)
        raise


def _order(neurons: Neurons, statistic: InputStatistic | None, plan: Plan) -> Tensor:
    """Find the order by Wanda's score, squared, which is what the output loses where inputs are not correlated."""
    score_OI = neurons.reader.weight_OI.float().square()
    if statistic is not None and statistic.tokens:
        score_OI *= statistic.total.to(score_OI)
    pattern = plan.patterns[neurons.reader.name]
    assert isinstance(pattern, SemiStructured)
    return grouped(score_OI, pattern)


def _reorder(neurons: Sequence[Neurons], orders: Sequence[Tensor], inputs: CalibratedLayer | None) -> None:
    for each, order_I in zip(neurons, orders, strict=True):
        reorder_neurons(each, order_I)
        if inputs is not None and inputs.dense_inputs is not None:
            inputs.dense_inputs.reorder(each.reader.module, order_I)
