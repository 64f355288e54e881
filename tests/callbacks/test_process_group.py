"""Our callbacks leave the process group that the Trainer made; nobody else's is touched."""

import subprocess
import sys

import pytest

CODE = """
import atexit
from torch import distributed
atexit.register(lambda: print("still in it:", distributed.is_initialized()))
import wanda_lightning
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
settings = dict(accelerator="cpu", devices=1, strategy="ddp", logger=False, limit_val_batches=1)
trainer = Trainer(**settings, enable_progress_bar=False, callbacks=[{}])
trainer.validate(BoringModel(), verbose=False)
"""


@pytest.mark.parametrize(("callback", "still"), [("", True), ("wanda_lightning.SparseFinetuning()", False)])
def test_who_leaves_the_process_group(callback, still, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", CODE.format(callback)], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.stdout.splitlines()[-1] == f"still in it: {still}"
