"""OWL: layers with more outliers are pruned less (Yin et al. 2023, arXiv:2310.05175)."""

from collections.abc import Mapping
from dataclasses import dataclass

from wanda_lightning.allocation.allocator import Allocator, Task, layer_shares, weighted_mean
from wanda_lightning.arguments import plain_fields, positive_number
from wanda_lightning.methods.wanda import Wanda
from wanda_lightning.model.decoder import DecoderLayer
from wanda_lightning.model.offload import in_memory
from wanda_lightning.precision import longest_float
from wanda_lightning.report.allotment import Allotment
from wanda_lightning.statistics import InputStatistic


@dataclass(frozen=True)
class OWL(Allocator):
    """Prune each decoder layer by its share of outliers (arXiv:2310.05175, section 4).

    The outliers of a layer are the weights whose score |W_ij| * ||X_j||_2 is more than ``factor`` times the mean over
    all linears of the layer. What layers keep is spread over ``2 * spread``, linearly in their share of outliers; all
    linears of a layer are pruned alike. The scores are those of the dense model.

    Args:
        factor: M of the paper, above 0; an outlier is so many times as large as the mean. The paper tries 3 to 10.
        spread: lambda of the paper, above 0: no layer is pruned more than twice this more than another.

    Raises:
        ValueError: If a setting is not a positive number.

    Examples:
        >>> OWL()
        OWL(factor=5.0, spread=0.08)
    """

    factor: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        plain_fields(self)
        positive_number("factor", self.factor)
        positive_number("spread", self.spread)

    def allocate(self, task: Task) -> Allotment:
        """Count outliers in the dense model, and prune layers with many of them less.

        Args:
            task: What is asked for.

        Returns:
            A sparsity for each linear.
        """
        norms, layers = task.input_norms(), task.pruned_layers
        outliers = [self._outliers(layer, norms) for layer in layers]
        least, most = min(outliers), max(outliers)
        kept = [2 * self.spread * (share - least) / (most - least) if most > least else 0.0 for share in outliers]
        mean = weighted_mean(kept, layers)
        patterns = layer_shares(task, [task.pattern.sparsity + mean - extra for extra in kept], str(self))
        why = {linear.name: share for layer, share in zip(layers, outliers, strict=True) for linear in layer.linears}
        return self.allotment(patterns, figure="outliers (%)", reasons=why)

    def _outliers(self, layer: DecoderLayer, norms: Mapping[str, InputStatistic]) -> float:
        """Return the per cent of a layer's weights whose score is far above the layer's mean."""
        with in_memory(layer.module):
            scores = [Wanda().score(linear.weight_OI, norms[linear.name]) for linear in layer.linears]
        weights = sum(score_OI.numel() for score_OI in scores)
        mean = sum(float(score_OI.sum(dtype=longest_float(score_OI.device))) for score_OI in scores) / weights
        return 100 * sum(int((score_OI > self.factor * mean).sum()) for score_OI in scores) / weights
