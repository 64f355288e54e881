"""A callback for each pruning method."""

from typing import Any, Literal

from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.methods import ADMM, RIA, Ablate, Magnitude, SparseGPT, Wanda


class MagnitudePruning(PruningCallback):
    """Prunes the smallest weights of every linear (Han et al. 2015, arXiv:1506.02626); needs no calibration.

    Args:
        sparsity: Fraction of weights to prune, in [0, 1). Default: 0.5, or what the N:M pattern says.
        pattern: ``unstructured``, or ``n:m`` to keep n of every m consecutive inputs (quoted in YAML: ``"2:4"``).
        refine: Steps of conjugate gradients that then fit the kept weights to the dense outputs; they need calibration.
        kwargs: Further arguments of :class:`PruningCallback`.

    Example::

        Trainer(callbacks=[MagnitudePruning(sparsity=0.5)]).fit(module, datamodule)
    """

    def __init__(
        self, sparsity: float | None = None, pattern: str = "unstructured", refine: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(Magnitude(refine), sparsity, pattern, **kwargs)


class WandaPruning(PruningCallback):
    """Prunes by weights and activations (Wanda, Sun et al. 2023, arXiv:2306.11695).

    Args:
        sparsity: Fraction of weights to prune, in [0, 1). Default: 0.5, or what the N:M pattern says.
        pattern: ``unstructured``, or ``n:m`` to keep n of every m consecutive inputs (quoted in YAML: ``"2:4"``).
        variant: Let each output row give up the same share of its score instead of the same number of weights.
        refine: Steps of conjugate gradients that then fit the kept weights to the dense outputs; 0 for none.
        kwargs: Further arguments of :class:`PruningCallback`.

    Example::

        Trainer(callbacks=[WandaPruning(sparsity=0.5)]).fit(module, datamodule)
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        variant: bool = False,
        refine: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(Wanda(variant, refine), sparsity, pattern, **kwargs)


class SparseGPTPruning(PruningCallback):
    """Prunes with second-order updates of the weights that stay (SparseGPT, Frantar and Alistarh, arXiv:2301.00774).

    Args:
        sparsity: Fraction of weights to prune, in [0, 1). Default: 0.5, or what the N:M pattern says.
        pattern: ``unstructured``, or ``n:m`` to keep n of every m consecutive inputs (quoted in YAML: ``"2:4"``).
        block_size: Columns that are chosen at once; a multiple of m for N:M patterns.
        damping: Fraction of the Hessian's mean diagonal that is added to its diagonal, above 0.
        refine: Steps of conjugate gradients that then fit the kept weights to the dense outputs; 0 for none.
        shrinkage: Fraction of each of the Hessian's diagonal entries that is added to itself, 0 or more: correlations
            are overrated on few tokens. 0 as published.
        kwargs: Further arguments of :class:`PruningCallback`.

    Example::

        Trainer(callbacks=[SparseGPTPruning(pattern="2:4")]).fit(module, datamodule)
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        block_size: int = 128,
        damping: float = 0.01,
        refine: int = 0,
        shrinkage: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(SparseGPT(block_size, damping, refine, shrinkage), sparsity, pattern, **kwargs)


class AblatePruning(PruningCallback):
    """Prunes what Wanda or magnitude choose, with SparseGPT's updates of the weights that stay (arXiv:2306.11695).

    Args:
        sparsity: Fraction of weights to prune, in [0, 1). Default: 0.5, or what the N:M pattern says.
        pattern: ``unstructured``, or ``n:m`` to keep n of every m consecutive inputs (quoted in YAML: ``"2:4"``).
        selection: Choose by Wanda's score or by magnitude.
        schedule: Choose everything before the first update, or block by block from updated weights.
        block_size: Columns between two updates of all later columns; a multiple of m for N:M patterns.
        damping: Fraction of the Hessian's mean diagonal that is added to its diagonal, above 0.
        refine: Steps of conjugate gradients that then fit the kept weights to the dense outputs; 0 for none.
        kwargs: Further arguments of :class:`PruningCallback`.

    Example::

        Trainer(callbacks=[AblatePruning(pattern="2:4")]).fit(module, datamodule)
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        selection: Literal["wanda", "magnitude"] = "wanda",
        schedule: Literal["sequential", "iterative"] = "sequential",
        block_size: int = 128,
        damping: float = 0.01,
        refine: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(Ablate(selection, schedule, block_size, damping, refine), sparsity, pattern, **kwargs)


class ADMMPruning(PruningCallback):
    """Finds mask and weights together, by ADMM with a mask that grows (Boza 2024, arXiv:2401.02938).

    Args:
        sparsity: Fraction of weights to prune, in [0, 1). Default: 0.5, or what the N:M pattern says.
        pattern: ``unstructured``, or ``n:m`` to keep n of every m consecutive inputs (quoted in YAML: ``"2:4"``).
        steps: Number of steps in which the mask grows to its full sparsity, at least 1.
        rho: How strongly weights are drawn to the mask at the end, above 0.
        damping: Fraction of the Hessian's diagonal that is added to it, above 0.
        refine: Steps of conjugate gradients that then fit the kept weights to the dense outputs; 0 for none.
        kwargs: Further arguments of :class:`PruningCallback`.

    Example::

        Trainer(callbacks=[ADMMPruning(pattern="2:4")]).fit(module, datamodule)
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        steps: int = 40,
        rho: float = 1.0,
        damping: float = 0.01,
        refine: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(ADMM(steps, rho, damping, refine), sparsity, pattern, **kwargs)


class RIAPruning(PruningCallback):
    """Prunes by relative importance and activations (RIA, Zhang et al. 2024, ICLR, openreview.net/forum?id=Tr0lPx9woF).

    Args:
        sparsity: Fraction of weights to prune, in [0, 1). Default: 0.5, or what the N:M pattern says.
        pattern: ``unstructured``, or ``n:m`` to keep n of every m consecutive inputs (quoted in YAML: ``"2:4"``).
        power: Exponent of the inputs' norms, at least 0.
        kwargs: Further arguments of :class:`PruningCallback`.

    Example::

        Trainer(callbacks=[RIAPruning(sparsity=0.5)]).fit(module, datamodule)
    """

    def __init__(
        self, sparsity: float | None = None, pattern: str = "unstructured", power: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(RIA(power), sparsity, pattern, **kwargs)
