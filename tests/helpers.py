"""What the tests share: tiny random models, batches, a quiet Trainer. No test needs a model hub."""

import hashlib

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from wanda_lightning import PruningTrainer, TextDataModule


def tiny_llama(layers: int = 3, seed: int = 0, **config) -> LlamaForCausalLM:
    """A LLaMA of width 32 with grouped-query attention, random weights, float32, in eval mode."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | config)).eval()


def tiny_mixtral() -> MixtralForCausalLM:
    """A mixture of four fused experts a layer, like :func:`tiny_llama` otherwise."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4, initializer_range=0.2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def tiny_zamba2():
    """Four layers of which two share one block of attention, where each calls an adapter of its own."""
    from transformers import Zamba2Config, Zamba2ForCausalLM

    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, n_mamba_heads=8, mamba_d_state=8, mamba_headdim=8, mamba_ngroups=1, chunk_size=8,
        num_mem_blocks=1, adapter_rank=8, layer_types=["mamba", "hybrid"] * 2, hybrid_layer_ids=[1, 3], pad_token_id=0,
    )  # fmt: skip
    return Zamba2ForCausalLM(config).eval()


def token_batches(batches: int = 4, batch_size: int = 2, length: int = 16, seed: int = 1, vocab: int = 256):
    """Random token ids, a list of (B, T) batches."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, vocab, (batches, batch_size, length), generator=generator))


# Forked processes need not import everything again; where there is a GPU its threads forbid training in them.
TWO_PROCESSES = {"devices": 2, "strategy": "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"}


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


class SomebodysModule(LightningModule):
    """A LightningModule that knows nothing of pruning; it happens to hold a Hugging Face model."""

    def __init__(self, lazy: bool = False, optimizer=torch.optim.AdamW, automatic: bool = True):
        super().__init__()
        self.net = None if lazy else tiny_llama(layers=2)
        self.optimizer = optimizer
        self.automatic_optimization = automatic

    def configure_model(self):
        if self.net is None:
            self.net = tiny_llama(layers=2)

    def training_step(self, batch, batch_idx):
        loss = self.net(input_ids=batch, labels=batch).loss
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(input_ids=batch, labels=batch).loss)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.net(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self):
        return self.optimizer(self.net.parameters(), lr=0.01)


def batches(seed: int = 1):
    """Four batches of two sequences."""
    return DataLoader(token_batches(seed=seed), batch_size=None)


class SomebodysData(LightningDataModule):
    def calibration_dataloader(self):
        return batches(seed=3)

    def train_dataloader(self):
        return batches()

    def val_dataloader(self):
        return batches(seed=2)


def trainer(tmp_path, *callbacks, cls=Trainer, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"accelerator": "cpu", "max_steps": 3, "enable_checkpointing": False, **quiet}
    return cls(default_root_dir=tmp_path, callbacks=list(callbacks), **defaults | settings)


def pruning_trainer(folder, *callbacks, **settings) -> PruningTrainer:
    return trainer(folder, *callbacks, cls=PruningTrainer, **settings)


def few_windows(**settings) -> TextDataModule:
    """The built-in text, four short windows of it for each purpose."""
    return TextDataModule(num_samples=4, sequence_length=16, max_evaluation_windows=4, **settings)


def sparsities(module: SomebodysModule) -> set[float]:
    """The sparsity of every linear of the decoder."""
    linears = [m for n, m in module.net.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    return {(m.weight == 0).float().mean().item() for m in linears}


def loader(masked: bool = False) -> DataLoader:
    batches = [{"input_ids": ids} for ids in token_batches(vocab=257)]
    if masked:
        for batch in batches:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, -5:] = 0
    return DataLoader(batches, batch_size=None)


MIXTURE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def mixtral(**settings):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**MIXTURE | settings)).eval()


class Forked(torch.nn.Module):
    """Which of its linears comes first depends on the number of tokens."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, hidden):
        first, then = (self.up_proj, self.down_proj) if hidden.shape[1] > 8 else (self.down_proj, self.up_proj)
        return then(first(hidden))
