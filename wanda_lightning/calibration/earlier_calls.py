"""What is gathered of a layer that the model calls several times: it goes on from what its earlier calls gave."""

from collections.abc import Mapping
from copy import deepcopy

from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.statistics import InputStatistic


class NewStatistics:
    """Makes the statistics of a layer's linears.

    Args:
        kind: The kind of statistic.
        earlier: What earlier calls of the layer gave, by linear name; what is empty or of another kind is not used.
    """

    def __init__(self, kind: type[InputStatistic], earlier: Mapping[str, InputStatistic]) -> None:
        self._kind = kind
        self._earlier = {name: each for name, each in earlier.items() if type(each) is kind and each.tokens}

    def of(self, linear: PrunableLinear) -> InputStatistic:
        """Return the statistic of a linear's inputs: empty, or what earlier calls gave."""
        if linear.name in self._earlier:
            return deepcopy(self._earlier[linear.name])
        return self._kind(linear.weight_OI.shape[1], linear.weight.device)

    def has_begun(self, linear: PrunableLinear) -> bool:
        """Whether an earlier call of the layer has called a linear."""
        return linear.name in self._earlier

    def are_one(self, linear: str, other: str) -> bool:
        """Whether two linears that share an input had one statistic in the earlier calls, too."""
        return self._earlier.get(linear) is self._earlier.get(other)
