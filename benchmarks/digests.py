"""SHA-256 digests of all weights after pruning: does another version of the package prune to the same bytes?

    python benchmarks/digests.py --output before.json     # in one version
    python benchmarks/digests.py --compare before.json    # in another: exits 1 with the names that differ

Both take --model FOLDER too, to prune a real model besides the tiny ones.

On the CPU, one thread, float32 unless a name says otherwise. Only names that the package exports are used, so that the
same file runs in any checkout. Digests of different versions of torch or transformers need not be equal.
"""

import argparse
import hashlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest import mock

import lightning
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from wanda_lightning import (
    Ablate,
    Magnitude,
    PruningTrainer,
    SemiStructured,
    SparseGPT,
    SparseGPTPruning,
    TextDataModule,
    Unstructured,
    Wanda,
    WandaPruning,
    prune_model,
)

VOCABULARY = 300
REAL = "real model"
PATTERNS: dict[str, Any] = {"50%": Unstructured(0.5), "2:4": SemiStructured(2, 4)}
BLOCK = 16  # narrower than the tiny models, so that there are several
METHODS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "wanda variant": Wanda(variant=True),
    "sparsegpt": SparseGPT(block_size=BLOCK),
    "ablate wanda sequential": Ablate("wanda", "sequential", block_size=BLOCK),
    "ablate wanda iterative": Ablate("wanda", "iterative", block_size=BLOCK),
    "ablate magnitude sequential": Ablate("magnitude", "sequential", block_size=BLOCK),
    "ablate magnitude iterative": Ablate("magnitude", "iterative", block_size=BLOCK),
}
Case = tuple[str, Callable[[], str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="prune this model too, as save_pretrained writes it")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the digests as JSON (default: print them)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="what --output wrote in another version")
    options = parser.parse_args()

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    digests = {}
    for name, digest in cases(options.model):
        digests[name] = digest()
        print(f"{digests[name][:16]}  {name}", file=sys.stderr, flush=True)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, lightning)}
    written = json.dumps({"versions": versions, "digests": digests}, indent=2) + "\n"
    if options.output:
        options.output.write_text(written, encoding="utf-8")
    elif not options.compare:
        print(written, end="")
    if options.compare:
        other = json.loads(options.compare.read_text(encoding="utf-8"))
        wanted = {name: value for name, value in other["digests"].items() if options.model or not name.startswith(REAL)}
        differing = [name for name in wanted | digests if wanted.get(name) != digests.get(name)]
        if differing:
            versions_differ = f" ({other['versions']} there, {versions} here)" if other["versions"] != versions else ""
            sys.exit("\n".join([f"{len(differing)} of {len(wanted | digests)} differ{versions_differ}:", *differing]))
        print(f"all {len(digests)} digests are equal")


def cases(folder: str | None) -> Iterator[Case]:
    """Yield every case: its name, and what gives its digest."""
    models = {"llama": tiny_llama, "mixtral": tiny_mixtral, "gpt2": tiny_gpt2}
    for name, model in models.items():
        for method in METHODS:
            for pattern in ["50%"] if method == "wanda variant" else PATTERNS:
                yield f"{name}, {method}, {pattern}", partial(pruned, model, batches, METHODS[method], pattern)
    for method in ("wanda", "sparsegpt"):
        of = METHODS[method]
        yield f"llama, padded batches, {method}, 50%", partial(pruned, tiny_llama, padded_batches, of, "50%")
        yield f"llama in bfloat16, {method}, 50%", partial(pruned, tiny_llama_in_bfloat16, batches, of, "50%")
        yield f"llama, resumed after a crash, {method}, 50%", partial(resumed, method)
    yield "llama, wanda, 50%, two steps of training", trained
    if folder is not None:
        real_model, windows = partial(load, folder), partial(text_windows, folder)
        for method, of in {"wanda": Wanda(), "sparsegpt": SparseGPT()}.items():
            for pattern in PATTERNS:
                yield f"{REAL}, {method}, {pattern}", partial(pruned, real_model, windows, of, pattern)
        yield f"{REAL}, windows of TextDataModule", partial(windows_of_data_module, folder)


def pruned(build: Callable[[], nn.Module], calibration: Callable[[], list[Any]], method: Any, pattern: str) -> str:
    model = build()
    prune_model(model, calibration(), method, PATTERNS[pattern])
    return weights_digest(model)


def resumed(method: str) -> str:
    """Prune with a crash in the second layer, go on in a new run, and make sure that the crash left no trace."""
    with tempfile.TemporaryDirectory() as folder:
        whole, calls = run_of_trainer(method, f"{folder}/whole")
        try:
            run_of_trainer(method, f"{folder}/parts", crash_at=calls // 2)
        except CrashError:
            pass
        else:
            raise RuntimeError("the run that was to crash did not")
        module, calls_after = run_of_trainer(method, f"{folder}/parts")
    if not calls_after < calls:
        raise RuntimeError(f"nothing was resumed: {calls_after} of {calls} linears were pruned after the crash")
    digest = weights_digest(module.model)
    if digest != weights_digest(whole.model):
        raise RuntimeError("a resumed run ends with other weights than one that was never interrupted")
    return digest


class CrashError(Exception):
    """Cuts a run off."""


def run_of_trainer(method: str, folder: str, crash_at: int | None = None) -> tuple["TinyModule", int]:
    """Prune through Lightning with a journal; return the module, and how many linears the method was called for."""
    settings: dict[str, Any] = {"sparsity": 0.5, "output_dir": folder, "resume": True}
    kind: Any = type(METHODS[method])
    callback = WandaPruning(**settings) if kind is Wanda else SparseGPTPruning(block_size=BLOCK, **settings)
    original, calls = kind.prune, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        if calls == crash_at:
            raise CrashError
        calls += 1
        return original(*arguments)

    module = TinyModule()
    trainer = trainer_with(callback, folder)
    with mock.patch.object(kind, "prune", counted):
        trainer.prune(module, evaluate=False, save=False)
    return module, calls


def trained() -> str:
    """Prune and train for two steps, with the zeros kept."""
    module = TinyModule()
    with tempfile.TemporaryDirectory() as folder:
        trainer_with(WandaPruning(sparsity=0.5), folder, max_steps=2).fit(module)
    return weights_digest(module.model)


def trainer_with(callback: Any, folder: str, **settings: Any) -> PruningTrainer:
    return PruningTrainer(
        default_root_dir=folder,
        callbacks=[callback],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **settings},
    )


class TinyModule(LightningModule):
    """A tiny LLaMA with its own calibration and training batches."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()

    def calibration_dataloader(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": ids_BT} for ids_BT in batches()]

    def train_dataloader(self) -> DataLoader:
        rows: Any = [{"input_ids": ids_T} for ids_T in torch.cat(batches())]
        return DataLoader(rows, batch_size=2)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **dimensions())).eval()


def tiny_llama_in_bfloat16() -> nn.Module:
    return tiny_llama().bfloat16()


def tiny_mixtral() -> nn.Module:
    """Four experts a layer, whose weights are fused."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, num_local_experts=4, **dimensions())).eval()


def tiny_gpt2() -> nn.Module:
    """Conv1D, whose weights are transposed."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def dimensions() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }


def batches(number: int = 4, size: int = 2, length: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, VOCABULARY, (number, size, length), generator=generator))


def padded_batches() -> list[dict[str, Tensor]]:
    """Rows of different lengths, padded on the right in some batches and on the left in others."""
    result = []
    for number, ids_BT in enumerate(batches()):
        length = ids_BT.shape[1]
        lengths_B1 = torch.tensor([[length - number], [length - 5]])
        mask_BT = (torch.arange(length) < lengths_B1).long()
        result.append({"input_ids": ids_BT, "attention_mask": mask_BT.flip(1) if number % 2 else mask_BT})
    return result


def load(folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def text_windows(folder: str, number: int = 8, length: int = 128) -> list[Tensor]:
    """Take the first windows of Python's own documentation, one a batch."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids_1L = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    return list(ids_1L[:, : number * length].split(length, dim=1))


def windows_of_data_module(folder: str) -> str:
    """Digest the first windows of every dataloader of the built-in text."""
    data = TextDataModule(tokenizer=folder, num_samples=4, sequence_length=64)
    data.setup()
    loaders = {
        "calibration": data.calibration_dataloader(),
        "train": data.train_dataloader(),
        "evaluation": data.val_dataloader(),
    }
    windows = {name: torch.cat([batch["input_ids"] for batch in islice(each, 4)]) for name, each in loaders.items()}
    return digest_of(windows)


def weights_digest(model: nn.Module) -> str:
    return digest_of(model.state_dict())


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and every bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
