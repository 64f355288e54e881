"""What a report says of the reconstruction of one decoder layer."""

from dataclasses import dataclass


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
