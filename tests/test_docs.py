"""Every Python block of the documentation runs, on a tiny model; links and commands lead somewhere."""

import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from conftest import token_batches

from wanda_lightning import __main__
from wanda_lightning.cli import PruningCLI
from wanda_lightning.packaged import find

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
SMALLER = {
    "sequence_length=512": "sequence_length=16",
    "num_samples=64": "num_samples=4",
    "max_steps=100": "max_steps=2",
    "Trainer(": "Trainer(enable_progress_bar=False, limit_val_batches=2, accelerator='cpu', ",
}


@pytest.mark.parametrize("code", BLOCKS)
def test_blocks_run(code, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_text.txt").write_text(topics["assert"] * 10)
    for name in ("MODEL", "results/wanda/model"):
        code = code.replace(f'"{name}"', f'"{tiny_model_folder}"')
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    names = {"batches": token_batches(vocab=200)}
    exec(code, names)
    if "report" in names:
        assert names["report"].sparsity > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page):
    commands = {*PruningCLI.subcommands(), *__main__.COMMANDS}
    for command, rest in re.findall(r"^    wanda-lightning (\w+)(.*?)(?:#|$)", page.read_text(), re.MULTILINE):
        assert command in commands
        for recipe in re.findall(r"-c (\w+)", rest):
            assert find(recipe).exists()


def test_the_index_lists_every_page():
    index = (DOCS / "README.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES if page.name != "README.md")
