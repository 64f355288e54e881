"""When a learning-rate scheduler is stepped, in the words of Lightning."""

from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau


def when_to_step(scheduler: Any) -> dict[str, Any]:
    """Step a scheduler after every optimizer step, or after every epoch with the metric that it waits for.

    Args:
        scheduler: A scheduler of torch, or that of Lightning which waits for a metric.

    Returns:
        What ``configure_optimizers`` says of it.

    Raises:
        ValueError: If it waits for a metric, and does not say which.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    if not hasattr(scheduler, "monitor"):
        raise ValueError(
            "ReduceLROnPlateau needs a metric: take lightning.pytorch.cli's, monitor='val/perplexity' or 'train/loss'"
        )
    return {"scheduler": scheduler, "monitor": scheduler.monitor}
