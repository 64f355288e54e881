import pytest

from wanda_lightning import ATP, OWL, LeastLoss
from wanda_lightning.methods import Ablate, Magnitude, SparseGPT, Wanda
from wanda_lightning.methods.named import METHODS
from wanda_lightning.report.titles import USUAL, title_of


def test_the_usual_settings_are_those_of_the_methods():
    known = [*METHODS.values(), OWL, ATP, LeastLoss]
    assert {f"{name}({settings})" for name, settings in USUAL.items()} == {str(cls()) for cls in known}
    assert {title_of(str(cls())) for cls in known} == {cls.__name__ for cls in known}


@pytest.mark.parametrize(
    ("method", "title"),
    [
        (Wanda(variant=True), "Wanda(variant=True)"),
        (Wanda(refine=20), "Wanda(refine=20)"),
        (Magnitude(), "Magnitude"),
        (SparseGPT(block_size=64), "SparseGPT(block_size=64)"),
        (Ablate("magnitude"), "Ablate(selection='magnitude')"),
        ("already pruned, not by this run's Wanda(variant=False)", "already pruned, not by this run's Wanda"),
        ("MyWanda(variant=False)", "MyWanda(variant=False)"),
        ("Other(a=(1, 2))", "Other(a=(1, 2))"),
    ],
)
def test_titles(method, title):
    assert title_of(str(method)) == title
