"""Products with a linear's weight that the model takes without calling the linear, as Mamba does with ``dt_proj``.

Shapes: B batch, T tokens, I in features.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from wanda_lightning.model.products import MATMULS, Products


class WeightProducts(Products):
    """Within it, every product ``weight @ x`` shows what would have entered the linear that the weight is of.

    Args:
        modules: The linears.
        called: Takes a linear's module and its inputs, shape (B, T, I), before the product is taken.
    """

    def __init__(self, modules: Iterable[nn.Module], called: Callable[[nn.Module, Tensor], None]) -> None:
        by_weight = {id(each.weight): each for each in modules if isinstance(each, nn.Linear)}

        def see(left: Tensor, right: Tensor) -> None:
            if (module := by_weight.get(id(left))) is not None:
                called(module, right.mT)

        super().__init__(MATMULS, see)
