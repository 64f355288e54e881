"""The shape of the house: what may import what, read from the disk, and how much it costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import wanda_lightning

PACKAGE = Path(wanda_lightning.__file__).parent

# What each room may import, from the ground up: a room stands on rooms above it in this list only, so there is no
# circle. The doors, ``__init__`` and ``__main__``, lead everywhere; ``moved`` only knows names.
ROOMS = {
    "moved": set(),
    "arguments": set(),
    "lowest_scores": set(),
    "sparsity": {"arguments", "lowest_scores"},
    "atomic_files": set(),
    "json_files": {"atomic_files"},
    "terminal": set(),
    "precision": set(),
    "solvers": {"precision", "sparsity"},
    "statistics": {"precision", "solvers"},
    "methods": {"arguments", "precision", "sparsity", "statistics", "solvers"},
    "model": {"precision", "sparsity"},
    "calibration": {"model", "precision", "solvers", "statistics"},
    "report": {"model", "atomic_files", "json_files"},
    "allocation": {"arguments", "calibration", "model", "methods", "precision", "report", "sparsity", "statistics"},
    "training": {"arguments", "model", "sparsity"},
    "engine": {
        "allocation", "arguments", "atomic_files", "calibration", "methods", "model", "precision", "report", "solvers",
        "sparsity", "statistics",
    },
    "checkpoints": {"arguments", "model", "training", "atomic_files"},
    "export": {"checkpoints", "model", "sparsity", "atomic_files"},
    "inspection": {"arguments", "checkpoints", "export", "json_files", "model", "report", "sparsity"},
    "data": {"arguments", "checkpoints", "model"},
    "evaluation": {"arguments", "checkpoints", "data", "model", "precision", "terminal"},
    "callbacks": {
        "allocation", "arguments", "atomic_files", "calibration", "checkpoints", "engine", "evaluation", "json_files",
        "methods", "model", "report", "sparsity", "terminal", "training",
    },
    "runs": {
        "allocation", "arguments", "atomic_files", "callbacks", "checkpoints", "engine", "evaluation", "export",
        "json_files", "methods", "model", "report", "sparsity", "training",
    },
    "cli": {"arguments", "callbacks", "checkpoints", "data", "export", "inspection", "runs", "sparsity"},
    "recipes": set(),
}  # fmt: skip
TORCH_ONLY = [
    "arguments", "lowest_scores", "sparsity", "atomic_files", "json_files", "precision", "solvers", "statistics",
    "methods", "model", "calibration", "allocation", "report", "training", "engine", "export",
]  # fmt: skip
HEAVY = {"lightning", "pytorch_lightning", "transformers", "datasets", "lm_eval", "peft", "rich", "torchmetrics"}


def room_of(file: Path, package: Path = PACKAGE) -> str:
    return file.relative_to(package).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, also within functions and for type checkers; and whether at once."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "wanda_lightning":
                names = [f"wanda_lightning.{alias.name}" for alias in node.names]
        yield from ((name, node in tree.body) for name in names)


def forbidden_imports(package: Path) -> list[str]:
    """Imports that lead up or aside, and those of large packages where torch has to do."""
    found = []
    for file in package.rglob("*.py"):
        room = room_of(file, package)
        if room in ("__init__", "__main__"):
            continue
        for name, at_once in imports(file):
            top, _, inner = name.partition(".")
            target = inner.partition(".")[0]
            if top == "wanda_lightning" and target != room and target in ROOMS and target not in ROOMS[room]:
                found.append(f"{file.relative_to(package)} imports {name}")
            if top in HEAVY and at_once and room in TORCH_ONLY:
                found.append(f"{file.relative_to(package)} imports {name}")
    return found


def loaded_modules(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running the code."""
    show = "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(
        subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, check=True).stdout.split()
    )


def test_every_room_is_in_the_table():
    on_disk = {room_of(file) for file in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert on_disk | {"recipes"} == set(ROOMS)


def test_imports_lead_downstairs_only():
    rooms = list(ROOMS)
    for room, stands_on in ROOMS.items():
        assert stands_on <= set(rooms[: rooms.index(room)]), room
    assert forbidden_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("methods", "from wanda_lightning.model.decoder import decoder_layers"),
        ("model", "import wanda_lightning.engine.pruner"),
        ("engine", "from lightning.pytorch import Trainer"),
        ("report", "from wanda_lightning import engine"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, room, line):
    (tmp_path / room).mkdir()
    (tmp_path / room / "new.py").write_text(f"{line}\n")
    assert len(forbidden_imports(tmp_path)) == 1


def test_importing_the_package_costs_nothing():
    assert loaded_modules("import wanda_lightning").isdisjoint({"lightning", "transformers", "torch"})


def test_the_engine_loads_torch_only():
    files = [file for file in PACKAGE.rglob("*.py") if room_of(file) in TORCH_ONLY]
    names = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    modules = loaded_modules("; ".join(f"import {name.removesuffix('.__init__')}" for name in sorted(names)))
    assert "torch" in modules
    assert modules.isdisjoint(HEAVY)


def test_public_names_resolve():
    for name in wanda_lightning.__all__:
        assert getattr(wanda_lightning, name).__name__ == name


def test_strict_type_checkers_see_the_public_names():
    """Names of a package with types are exported where they are imported as themselves; ``__all__`` is no literal."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert sorted(alias.asname or "" for node in block.body for alias in node.names) == sorted(wanda_lightning.__all__)


def test_files_and_classes_are_short():
    """A file of more lines is a room with two ideas in it; the loop over all has to fit on a screen."""
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 250, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 180, f"{node.name} in {file}"
            if isinstance(node, ast.FunctionDef) and node.name == "prune_model":
                assert node.end_lineno - node.body[1].lineno < 40


def test_the_doors_at_the_top_level_lead_into_the_package():
    root = PACKAGE.parent
    assert (root / "callbacks").resolve() == PACKAGE / "callbacks"
    assert (root / "recipes").resolve() == PACKAGE / "recipes"


def test_help_and_version_answer_before_lightning_is_imported():
    for option in ("--help", "--version"):
        code = (
            f"import sys; sys.argv = ['wanda-lightning', '{option}']; from wanda_lightning.__main__ import main; main()"
        )
        assert loaded_modules(code).isdisjoint({"lightning", "torch", "jsonargparse"})


def test_the_page_of_the_house_lists_every_room_above_those_that_import_it():
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[?`(\w+)(?:/|\.py)`", page, re.MULTILINE)
    assert sorted(listed) == sorted({*ROOMS} - {"moved"})
    for number, room in enumerate(listed):
        assert ROOMS[room] <= {*listed[:number]}, room
