"""How much of each linear is pruned, if not the same share of all."""

from collections.abc import Mapping, Sequence

from wanda_lightning.model.decoder import check_pattern
from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.sparsity import Pattern, as_pattern

Allocation = Mapping[str, float | str]


def allocate(linears: Sequence[PrunableLinear], pattern: Pattern, allocation: Allocation | None) -> dict[str, Pattern]:
    """Give every linear the pattern it is to be pruned to.

    Args:
        linears: The linears that are to be pruned.
        pattern: For the linears that the allocation does not mention.
        allocation: For shell-style patterns over names, in the style of ``targets``, a sparsity in [0, 1) or ``"n:m"``.
            Where several match a name, the last one holds.

    Returns:
        The patterns by linear name.

    Raises:
        ValueError: If a value cannot be read, or a name pattern matches none of the linears.

    Examples:
        >>> allocate([], as_pattern(0.5), None)
        {}
    """
    patterns = {linear.name: pattern for linear in linears}
    for name_pattern, value in (allocation or {}).items():
        try:
            own = as_pattern(value)
        except ValueError as error:
            raise ValueError(f"the allocation of {name_pattern!r} cannot be used: {error}") from error
        check_pattern(name_pattern, linears)
        patterns |= {linear.name: own for linear in linears if linear.matches(name_pattern)}
    return patterns
