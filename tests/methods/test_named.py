"""Methods by the names that users type."""

from typing import get_args

import pytest

from wanda_lightning import callbacks, methods
from wanda_lightning.methods import Wanda
from wanda_lightning.methods.named import METHODS, MethodName, as_method


def test_every_method_has_a_name_and_a_callback():
    public = {getattr(methods, name) for name in methods.__all__ if not name.endswith("Method")}
    assert set(METHODS.values()) == public
    assert all(hasattr(callbacks, f"{method.__name__}Pruning") for method in METHODS.values())


def test_the_type_of_names_is_that_of_all_names():
    assert get_args(MethodName) == tuple(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_name_gives_the_method_with_its_defaults(name):
    assert as_method(name) == as_method(name.upper()) == METHODS[name]()


def test_a_method_is_taken_as_it_is():
    method = Wanda(variant=True)
    assert as_method(method) is method


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("wonda", "one of magnitude, wanda, sparsegpt, ablate, admm, ria, or .*, got 'wonda'$"),
        (0.5, r"a pruning method such as Wanda\(\), got 0.5$"),
        (Wanda, r"write Wanda\(\)"),
        (None, "got None"),
    ],
)
def test_what_is_no_method(given, message):
    with pytest.raises(ValueError, match=message):
        as_method(given)
