"""What pip installs: recipes and types are in it, and nothing that is not the package."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import wanda_lightning

ROOT = Path(wanda_lightning.__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="installed, not a clone")
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    clone = tmp_path / "clone"  # building leaves files in the source tree
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, clone]
    subprocess.run(build, check=True, timeout=250)
    (wheel,) = tmp_path.glob("*.whl")
    tracked = subprocess.run(
        ["git", "ls-files", "wanda_lightning"], cwd=clone, check=True, capture_output=True, text=True
    ).stdout.split()
    with ZipFile(wheel) as contents:
        names = [name for name in contents.namelist() if ".dist-info/" not in name]
        assert sorted(names) == sorted(name for name in tracked if not name.endswith("README.md") or "recipes" in name)
        assert {"wanda_lightning/py.typed", "wanda_lightning/recipes/wanda.yaml"} <= set(names)
        (entry_points,) = (name for name in contents.namelist() if name.endswith("entry_points.txt"))
        assert b"wanda-lightning = wanda_lightning.__main__:main" in contents.read(entry_points)
        contents.extractall(tmp_path / "installed")
    # As installed, in a folder of its own: the package in the wheel runs, not the clone.
    code = "import wanda_lightning as w; print(w.__file__); [getattr(w, name) for name in w.__all__]"
    recipes = "from wanda_lightning.cli.recipes import main; main([])"
    elsewhere = {"cwd": tmp_path, "env": {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/usr/bin:/bin"}}
    for each, seen in ((code, str(tmp_path / "installed")), (recipes, "wanda_finetune ")):
        done = subprocess.run([sys.executable, "-c", each], capture_output=True, text=True, **elsewhere)
        assert seen in done.stdout, done.stderr
