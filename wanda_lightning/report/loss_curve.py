"""The loss of a training, in a number of points that does not grow with it."""

MOST = 400
Point = tuple[int, float]


def add_point(curve: list[Point], step: int, loss: float) -> None:
    """Add a point to a curve; once there are ``MOST``, every second one goes, and fewer are taken from then on.

    Args:
        curve: Steps and losses, in order; changed in place. It begins anew where the steps do.
        step: How many steps the optimizer has taken.
        loss: What the training minimises.
    """
    if curve and step < curve[-1][0]:
        curve.clear()
    if is_wanted(curve, step):
        curve.append((step, loss))
        if len(curve) >= MOST:
            del curve[1::2]


def is_wanted(curve: list[Point], step: int) -> bool:
    """Whether a step would be added: asked before the loss is read, for which a GPU has to be waited for."""
    if len(curve) < 2 or step < curve[-1][0]:
        return not curve or step != curve[-1][0]
    return step - curve[-1][0] >= curve[1][0] - curve[0][0]


def averaged(curve: list[Point], most: int) -> list[Point]:
    """Average neighbours, so that a noisy curve can be seen.

    Args:
        curve: Steps and losses.
        most: Points of the result at most.

    Returns:
        Last steps and mean losses of groups of the same size, of which the last may be smaller.
    """
    size = -(-len(curve) // most) or 1
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
