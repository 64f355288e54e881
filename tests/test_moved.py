"""What the docs of earlier versions import from inner modules still imports."""

import subprocess
import sys
from importlib import import_module

import pytest

import wanda_lightning
from wanda_lightning.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_is_the_new_one_with_a_warning(old, monkeypatch):
    new = import_module(f"wanda_lightning.{MOVED[old]}")
    monkeypatch.delitem(sys.modules, f"wanda_lightning.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"wanda_lightning.{old} is now {new.__name__}") as found:
        module = import_module(f"wanda_lightning.{old}")
    assert {warning.filename for warning in found} & {__file__, import_module.__code__.co_filename}
    for name in vars(new):
        if not name.startswith("__"):
            assert getattr(module, name) is getattr(new, name)
    assert new.__spec__.name == new.__name__


LINES = """
from wanda_lightning.distillation import Distillation
from wanda_lightning.inspection import inspect_model
from wanda_lightning.journal import Journal
from wanda_lightning.loading import load_streamed
from wanda_lightning.lora import LoraSettings
from wanda_lightning.saving import save_pretrained
from wanda_lightning.schedule import Gradual
from wanda_lightning.stored.compression import compress, load_compressed
import wanda_lightning
assert inspect_model is wanda_lightning.inspect_model
assert load_compressed is wanda_lightning.load_compressed
assert Gradual is wanda_lightning.Gradual
"""


def test_the_imports_that_the_docs_had():
    run = subprocess.run([sys.executable, "-W", "always", "-c", LINES], capture_output=True, text=True, check=True)
    assert (
        "<string>:2: DeprecationWarning: wanda_lightning.distillation is now wanda_lightning.training.distillation"
        in (run.stderr)
    )


def test_other_names_are_unknown_as_ever():
    with pytest.raises(ModuleNotFoundError, match=r"wanda_lightning\.nothing"):
        import_module("wanda_lightning.nothing")
    with pytest.raises(AttributeError):
        wanda_lightning.nothing  # noqa: B018
