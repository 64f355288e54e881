"""Inner modules under the names that earlier versions of the docs gave: they still import, with a warning."""

import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "decoder": "model.decoder",
    "distillation": "training.distillation",
    "journal": "engine.journal",
    "loading": "checkpoints.loading",
    "lora": "training.lora",
    "masks": "training.masks",
    "module": "runs.causal_lm",
    "processes": "engine.processes",
    "pruner": "engine.pruner",
    "saving": "checkpoints.saving",
    "schedule": "allocation.schedule",
    "semi_structured": "export.semi_structured",
    "stored": "export",
    "stored.compression": "export.compression",
    "trainer": "runs.trainer",
}


class MovedModules:
    """Finds modules by their old names; asked first, for an update may leave empty folders of these names behind."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Tell the import system that an old name is known."""
        package, _, inner = name.partition(".")
        known = package == __package__ and inner in MOVED
        return ModuleSpec(name, self, is_package=inner == "stored") if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python to make an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Let the module look up everything in the new one."""
        new = f"{__package__}.{MOVED[module.__name__.partition('.')[2]]}"
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        module.__getattr__ = partial(getattr, import_module(new))  # type: ignore[method-assign]
