"""The shape of the house: what may import what, and how much it costs."""

import subprocess
import sys
from pathlib import Path

import wanda_lightning

PACKAGE = Path(wanda_lightning.__file__).parent
ENGINE = [
    "sparsity", "statistics", "methods", "solvers", "linears", "patches", "experts", "decoder", "collector", "dry_run",
    "calibration", "allocation", "masks", "schedule", "semi_structured", "tables", "html_report", "report", "pruner",
    "magnitudes", "by_layer", "charts",
    "activations", "offload", "phases", "processes", "fingerprint", "journal", "layer_pruning",
]  # fmt: skip


def loaded_modules(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running the code."""
    show = "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(
        subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_the_package_costs_nothing():
    assert loaded_modules("import wanda_lightning").isdisjoint({"lightning", "transformers", "torch"})


def test_the_engine_imports_torch_only():
    modules = loaded_modules("; ".join(f"import wanda_lightning.{name}" for name in ENGINE))
    assert "torch" in modules
    assert modules.isdisjoint({"lightning", "transformers", "datasets", "lm_eval", "peft", "rich", "torchmetrics"})


def test_the_engine_does_not_name_lightning_or_transformers_in_an_import():
    for name in ENGINE:
        path = PACKAGE / name
        for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            for line in file.read_text().splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]):
                    assert words[1].partition(".")[0] not in {"lightning", "transformers", "datasets"}, (
                        f"{file}: {line}"
                    )


def test_public_names_resolve():
    for name in wanda_lightning.__all__:
        assert getattr(wanda_lightning, name).__name__ == name


def test_no_file_holds_two_ideas():
    long = {str(f): n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 300}
    assert not long


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
