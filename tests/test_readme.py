"""What the pages say runs."""

import re
from pathlib import Path

import torch
from conftest import token_batches

import wanda_lightning

PACKAGE = Path(wanda_lightning.__file__).parent
ROOT = PACKAGE.parent


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_trainer_example(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _ = code_blocks(ROOT / "README.md")
    code = code.replace("path/or/hub-name", str(tiny_model_folder)).replace("max_steps=100", "max_steps=2")
    names = {}
    exec(code.replace("sequence_length=512", "sequence_length=16, num_samples=4"), names)
    (callback,) = [c for c in names["trainer"].callbacks if isinstance(c, wanda_lightning.WandaPruning)]
    assert callback.report.sparsity == 0.5


def test_the_plain_example(llama):
    _, code = code_blocks(ROOT / "README.md")
    names = {"model": llama, "batches": token_batches()}
    exec(code, names)
    assert names["report"].pattern == "2:4"
    assert names["report"].sparsity == 0.5
    assert len(names["report"].linears) == 18


def test_a_new_method_in_one_file(llama):
    (code,) = code_blocks(PACKAGE / "README.md")
    names = {}
    exec(code, names)
    report = wanda_lightning.prune_model(
        llama, token_batches(), names["SquaredWanda"](), wanda_lightning.Unstructured(0.5)
    )
    assert report.sparsity == 0.5
    assert torch.count_nonzero(llama.model.layers[2].mlp.up_proj.weight).item() == 64 * 16


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", PACKAGE / "README.md", PACKAGE / "recipes/README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
