"""What a pruning method is: a weight and a statistic of its inputs go in, a mask comes out.

A method never sees a model. Shapes: O out features, I in features.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from wanda_lightning.arguments import as_call, attributes_of, plain_fields, whole_number, without_addresses
from wanda_lightning.methods.refinement import refined
from wanda_lightning.sparsity import Pattern, zero_where_pruned
from wanda_lightning.statistics import InputStatistic

LATER = ("refine", "shrinkage")
"""Settings that the first versions did not know."""


class PruningMethod(ABC):
    """Chooses which weights of a linear to remove and, in some methods, updates those that stay.

    Attributes:
        refine: Steps of conjugate gradients after :meth:`prune`, see :mod:`wanda_lightning.methods.refinement`.
    """

    refine: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        whole_number("refine", self.refine, 0)

    @property
    def zeros_stay(self) -> bool:
        """Whether weights that are zero stay so when more is pruned; not if others are updated before the choice.

        A class attribute will do.
        """
        return True

    @property
    @abstractmethod
    def statistic(self) -> type[InputStatistic] | None:
        """The statistic of the inputs that :meth:`prune` needs; None without calibration. A class attribute will do."""

    def __repr__(self) -> str:
        """Name the method and its settings; attributes that begin with an underscore are none.

        ``refine`` and ``shrinkage`` of 0 are left out: runs of versions that did not know them are the same runs.
        """
        settings = attributes_of(self)
        return as_call(self, {name: settings[name] for name in settings if name not in LATER or settings[name]})

    def __str__(self) -> str:
        """Name it alike in every process: reports and resumed runs know it by that."""
        return without_addresses(repr(self))

    @abstractmethod
    def prune(self, weight_OI: Tensor, statistic: InputStatistic | None, pattern: Pattern) -> Tensor:
        """Prune one weight in place.

        Args:
            weight_OI: Weight, shape (out_features, in_features); changed in place.
            statistic: Statistic of the linear's inputs, of the type that the method's attribute ``statistic`` names.
            pattern: Which weights compete, and how many stay.

        Returns:
            Boolean mask of the weight's shape, True = kept.
        """

    def check(self, pattern: Pattern) -> None:
        """Refuse a pattern that the method cannot follow, before any weight has changed.

        Args:
            pattern: What is asked for.

        Raises:
            ValueError: If the pattern is not supported.
        """

    def tolerance(self, shape: tuple[int, int]) -> float:
        """Return how far a mask may be from the asked sparsity: rounding costs less than one weight in each group."""
        return 1 / shape[1]


class ScoreMethod(PruningMethod):
    """A method that scores every weight, removes the lowest and leaves the others as they are."""

    @abstractmethod
    def score(self, weight_OI: Tensor, statistic: InputStatistic | None) -> Tensor:
        """Return the importance of every weight, in any floating dtype, shape (out_features, in_features)."""

    def mask(self, score_OI: Tensor, pattern: Pattern) -> Tensor:
        """Choose the kept weights; by default weights compete within their output row."""
        return pattern.mask(score_OI)

    @refined
    def prune(self, weight_OI: Tensor, statistic: InputStatistic | None, pattern: Pattern) -> Tensor:
        """Remove the lowest-scored weights in place and return the mask (True = kept)."""
        mask_OI = self.mask(self.score(weight_OI, statistic), pattern)
        zero_where_pruned(weight_OI, mask_OI)
        return mask_OI
