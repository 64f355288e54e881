"""What a report says of the reconstruction of one decoder layer."""

from collections.abc import Mapping
from dataclasses import dataclass

from wanda_lightning.report.tables import Table


@dataclass(frozen=True)
class LayerReconstruction:
    """The error of a layer's output on calibration batches that were held out.

    Attributes:
        before: Behind the pruning: mean over the real tokens of ||out - dense out||^2 / ||dense out||^2.
        after: With the trained weights. Where no epoch lowered it, the weights are those of before, and so is this.
        epochs: After how many epochs the weights are taken; 0 where they are those of before.
        seconds: Time that the training took.
    """

    before: float
    after: float
    epochs: int
    seconds: float


def reconstruction_table(layers: Mapping[str, LayerReconstruction]) -> Table:
    """Show how the training of each layer changed its error on held-out batches: a header and rows of text."""
    return (
        ["reconstruction, held-out error", "before", "after", "change", "epochs", "seconds"],
        [
            [
                name,
                f"{layer.before:.4g}",
                f"{layer.after:.4g}",
                f"{layer.after / layer.before - 1:+.1%}" if layer.before else "",
                str(layer.epochs),
                f"{layer.seconds:.2f}",
            ]
            for name, layer in layers.items()
        ],
    )
