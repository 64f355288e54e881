"""What is asked of a pruning is refused where it contradicts itself, by whoever asks, before there is a model."""

import pytest

from wanda_lightning.allocation.owl import OWL
from wanda_lightning.allocation.selection import Selection
from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.engine.settings import PruningSettings
from wanda_lightning.methods import Magnitude, SparseGPT, Wanda
from wanda_lightning.sparsity import Unstructured
from wanda_lightning.statistics import InputHessian, InputNorm


class LargestInput(InputNorm):
    """A statistic that X^T X does not tell."""


class OwnMethod(Wanda):
    statistic = LargestInput


CONTRADICTIONS = {
    "Hessian of no use": (OwnMethod(), {"exact_error": True}, "needs LargestInput: leave exact_error out"),
    "target without use": (OwnMethod(), {"dense_target": True}, "needs LargestInput: leave dense_target out"),
    "two passes": (Wanda(), {"dense_target": True, "true_sequential": False}, "leave true_sequential=False out"),
    "nothing to permute": (Wanda(), {"permute": True}, 'of an N:M pattern such as "2:4", got unstructured'),
    "another kind": (Wanda(), {"reconstruction": True}, r"something like Reconstruction\(epochs=3\), got True"),
}


@pytest.mark.parametrize("asked", CONTRADICTIONS)
def test_callbacks_refuse_contradictions_as_they_are_made(asked):
    method, settings, said = CONTRADICTIONS[asked]
    with pytest.raises(ValueError, match=said):
        PruningSettings(method=method, pattern=Unstructured(0.5), **settings)
    with pytest.raises(ValueError, match=said):
        PruningCallback(method, 0.5, **settings)


@pytest.mark.parametrize(
    ("method", "settings", "asks"),
    [
        (Magnitude(), {}, None),
        (Magnitude(refine=1), {}, "Magnitude(refine=1)"),
        (Wanda(), {"exact_error": True}, "Wanda(variant=False"),
        (Magnitude(), {"exact_error": True}, "exact_error"),
        (Magnitude(), {"dense_target": True}, "dense_target"),
        (Magnitude(), {"reconstruction": Reconstruction(epochs=1)}, "Reconstruction"),
        (Magnitude(), {"selection": Selection(allocation=OWL())}, "OWL("),
        (Magnitude(), {"selection": Selection(allocation={"q_proj": 0.3})}, None),
    ],
)
def test_the_first_setting_that_needs_batches_is_named(method, settings, asks):
    asked = PruningSettings(method=method, pattern=Unstructured(0.5), **settings).asks_for_batches
    assert asked == asks if asks is None else asked.startswith(asks)


def test_a_method_that_has_a_hessian_gathers_it_once():
    asked = PruningSettings(method=SparseGPT(), pattern=Unstructured(0.5), exact_error=True)
    assert asked.statistic is InputHessian
