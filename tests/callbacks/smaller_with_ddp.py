"""Make a model smaller and train it, with two processes under DDP. Run by test_shape_pruning.py, also by Lightning."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import SomebodysData, SomebodysModule, trainer

from wanda_lightning import DepthPruning, WandaPruning, WidthPruning

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    module = SomebodysModule()
    callbacks = [WidthPruning(keep=0.5), DepthPruning(layers=1), WandaPruning(pattern="2:4")]
    run = trainer(folder, *callbacks, strategy="ddp", devices=2, max_steps=2)
    run.fit(module, datamodule=SomebodysData())
    kept = [callback.report.kept for callback in callbacks[:2]]
    state = {name: tensor.clone() for name, tensor in module.net.state_dict().items()}
    torch.save((state, kept, callbacks[0].report.tokens), folder / f"{run.global_rank}.pt")
