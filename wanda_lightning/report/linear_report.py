"""What a report says of one pruned linear, and of several together."""

from dataclasses import dataclass, fields
from typing import Any

from wanda_lightning.model.names import kind_of

ERROR = (
    "error: how much of the output of a linear, a weight matrix of a layer, the pruning changed on the "
    "calibration set, ||(W - W') X||² / ||W X||²: 0 is nothing, 1 as much as there was; mean over linears; ~ where it "
    "is estimated from the norms of the inputs alone."
)


@dataclass(frozen=True)
class LinearReport:
    """One pruned linear.

    Attributes:
        name: Its name in the model.
        layer: The decoder layer's name.
        shape: (out_features, in_features).
        sparsity: Fraction of its weights that are zero.
        seconds: Time to choose the mask and update the weight.
        tokens: Calibration tokens that reached it; None for methods without calibration.
        error: Relative squared error of its output on the calibration set, ||(W - W') X||^2 / ||W X||^2.
            With ``dense_target``, W is the weight that was fitted to the dense model.
        error_is_exact: Whether ``error`` comes from the whole X^T X or only from its diagonal.
        passes: How often the calibration set ran through its layer: 2, or 1 where linears were pruned on the way.
        damping: For second-order methods, the damping that was used; it is larger than asked for if that failed.
        dense_target: How far W had been moved before it was pruned, in [0, 1]: 1 is to where it gives what it gives in
            the dense model, as far as it can, and 0 not at all. None where that was not asked for.
        same_as: The linear that has this matrix, too, and was pruned; None for one with a matrix of its own.
    """

    name: str
    layer: str
    shape: tuple[int, int]
    sparsity: float
    seconds: float
    tokens: int | None = None
    error: float | None = None
    error_is_exact: bool = False
    damping: float | None = None
    passes: int | None = None
    dense_target: float | None = None
    same_as: str | None = None

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "LinearReport":
        """Read a row back from what ``asdict`` and JSON made of it; names that rows no longer have are left out."""
        known = {field.name: plain[field.name] for field in fields(cls) if field.name in plain}
        return cls(**{**known, "shape": tuple(plain["shape"])})

    @property
    def kind(self) -> str:
        """Its name within the layer; the experts of a mixture are one kind: ``"mlp.experts.*.up_proj"``."""
        return kind_of(self.name, self.layer)


def mean_error(rows: list[LinearReport]) -> float | None:
    """Average the errors of rows; None where none was measured."""
    errors = [row.error for row in rows if row.error is not None]
    return sum(errors) / len(errors) if errors else None


def mean_sparsity(rows: list[LinearReport]) -> float:
    """Return the fraction of zeros over all weights of the rows; a matrix that several have counts once."""
    matrices = {row.same_as or row.name: row for row in rows}.values()
    weights = [row.shape[0] * row.shape[1] for row in matrices]
    return sum(w * row.sparsity for w, row in zip(weights, matrices, strict=True)) / max(1, sum(weights))
