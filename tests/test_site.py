"""The site builds: no dead link, no name that does not exist, and the reference has every public name."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import wanda_lightning

ROOT = Path(wanda_lightning.__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if find_spec("mkdocs") is None:
        pytest.skip("needs the extra [docs]")
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    return folder


def test_the_reference_has_every_public_name(site):
    anchors = {
        name for page in site.glob("reference/*/*.html") for name in re.findall(r'id="([^"]+)"', page.read_text())
    }
    assert anchors >= {f"wanda_lightning.{name}" for name in wanda_lightning.__all__}


def test_links_between_files_are_links_between_pages(site):
    """A link to a file beside the code works on a forge; on the site it leads to the page made of that file."""
    assert 'href="../benchmarks/#larger-than-memory"' in (site / "large-models/index.html").read_text()
    assert 'href="../reference/methods/"' in (site / "adding-a-method/index.html").read_text()
    assert 'href="../examples/#transformers_trainerpy"' in (site / "fine-tuning/index.html").read_text()
    assert 'href="../adding-a-method/"' in (site / "architecture/index.html").read_text()


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = r'(?:src|<link[^>]* href)="https?://([^"]+)"'
    pages = {str(page): re.findall(fetched, page.read_text()) for page in site.rglob("*.html")}
    assert pages
    assert not any(pages.values()), pages
