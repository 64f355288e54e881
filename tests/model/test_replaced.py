"""What is replaced is put back as it was found."""

import types
from contextlib import suppress

from torch import nn

from wanda_lightning.model.replaced import replaced


def test_a_method_of_the_class_shows_again():
    linear = nn.Linear(2, 2)
    before = dict(vars(linear))
    with replaced(linear, "forward", lambda x: x):
        assert linear(3) == 3
    assert vars(linear) == before
    assert linear.forward.__func__ is nn.Linear.forward


def test_an_attribute_of_the_object_comes_back_after_an_error():
    module = types.ModuleType("module")
    module.bar = original = object()
    with suppress(KeyError), replaced(module, "bar", None):
        assert module.bar is None
        raise KeyError
    assert module.bar is original


def test_one_within_another():
    linear = nn.Linear(2, 2)
    with replaced(linear, "forward", "outer"):
        with replaced(linear, "forward", "inner"):
            assert linear.forward == "inner"
        assert linear.forward == "outer"
    assert "forward" not in vars(linear)
