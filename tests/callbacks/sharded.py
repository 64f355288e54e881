"""Fine-tune a pruned model sharded by FSDP2 over two CPU processes. Run by test_sparse_finetuning.py."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import tiny_llama, token_batches

from wanda_lightning.callbacks import SparseFinetuning
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Magnitude
from wanda_lightning.sparsity import Unstructured


class Sharded(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = tiny_llama(layers=2)
            prune_model(self.net, None, Magnitude(), Unstructured(0.5))
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.01, weight_decay=0.5)

    def on_train_end(self):
        weights = {name: parameter.full_tensor() for name, parameter in self.net.named_parameters()}
        linears = {name for name, weight in weights.items() if weight.dim() == 2 and ".layers." in name}
        sparsities = {(weights[name] == 0).float().mean().item() for name in linears}
        trained = not torch.equal(weights["lm_head.weight"], tiny_llama(layers=2).lm_head.weight)
        if self.global_rank == 0:
            print(f"sparsities {sparsities}, trained {trained}", flush=True)


if __name__ == "__main__":
    Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
        max_steps=3,
        logger=False,
        default_root_dir=sys.argv[1],  # a checkpoint is written there, which looks at the zeros too
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SparseFinetuning()],
    ).fit(Sharded(), DataLoader(token_batches(batches=8), batch_size=None))
