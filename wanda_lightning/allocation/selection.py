"""Which linears of a model are pruned, and to what."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from wanda_lightning.allocation.allocator import Allocator
from wanda_lightning.allocation.by_name import Allocation, allocate
from wanda_lightning.arguments import instance_or_none
from wanda_lightning.model.decoder import DecoderLayer, count_matches, decoder_layers
from wanda_lightning.sparsity import Pattern


@dataclass(frozen=True)
class Selection:
    """What users say of linears, by patterns over their names.

    Attributes:
        targets: Linears to prune; None for all but routers and thin ones.
        ignore: Linears to leave dense.
        layers: Name of the list of decoder layers, where the rule for finding it fails; or names of several lists.
        allocation: Sparsities or ``"n:m"`` patterns that hold for some linears, or what will decide by looking at the
            model; until it has, the pattern holds for all.

    Raises:
        ValueError: If one is of another kind, such as a name where a list of names belongs.
    """

    targets: Sequence[str] | None = None
    ignore: Sequence[str] | None = None
    layers: str | Sequence[str] | None = None
    allocation: Allocation | Allocator | None = None

    def __post_init__(self) -> None:
        for name, given in {"targets": self.targets, "ignore": self.ignore}.items():
            if given is not None and not _are_names(given):
                raise ValueError(f'{name} must be a list of name patterns such as ["q_proj"], got {given!r}')
        if not (self.layers is None or isinstance(self.layers, str) or _are_names(self.layers)):
            raise ValueError(f'layers must be the name of a list of layers such as "model.layers", got {self.layers!r}')
        allocation = 'OWL() or {"down_proj": 0.3}'
        instance_or_none("allocation", self.allocation, (Allocator, Mapping), allocation)
        if not _are_names((self.by_name or {}).keys()):
            raise ValueError(f"allocation must be something like {allocation}, got {self.allocation!r}")

    @property
    def by_name(self) -> Allocation | None:
        """What the user has decided for some linears."""
        return None if isinstance(self.allocation, Allocator) else self.allocation

    @property
    def allocator(self) -> Allocator | None:
        """What is to decide for all of them."""
        return self.allocation if isinstance(self.allocation, Allocator) else None

    @property
    def needs_batches(self) -> bool:
        """Whether what is to decide needs a calibration set for that."""
        return self.allocator is not None and self.allocator.needs_batches

    def choose(self, model: nn.Module, pattern: Pattern) -> tuple[list[DecoderLayer], dict[str, Pattern]]:
        """Find the linears in a model.

        Args:
            model: The causal language model.
            pattern: For the linears that the allocation does not mention.

        Returns:
            The decoder layers with the linears that are to be pruned, and the pattern of each by name.

        Raises:
            ValueError: If a name pattern matches nothing, or a value of the allocation cannot be read.
        """
        decoder = decoder_layers(model, self.targets, self.ignore, self.layers)
        linears = [linear for layer in decoder for linear in layer.linears]
        return decoder, allocate(linears, pattern, self.by_name)

    def matches(self, decoder: Sequence[DecoderLayer]) -> dict[str, int]:
        """Count the linears that each of the name patterns fits."""
        return count_matches(decoder, [*(self.targets or ()), *(self.ignore or ()), *(self.by_name or ())])


def _are_names(given: object) -> bool:
    return isinstance(given, Collection) and not isinstance(given, str) and all(isinstance(each, str) for each in given)
