"""Tiny random models and a tiny tokenizer, built in memory: no test needs a model hub."""

import json
import os
from pathlib import Path
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library: fail at once, not after retries

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: the GPU kernel is interpreted on the CPU

from helpers import tiny_llama, token_batches
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from wanda_lightning.engine.processes import Processes

torch.set_num_threads(1)  # the models are tiny: threads would cost more than they bring

GOLDEN = Path(__file__).parent / "golden" / "reference_layers.safetensors"


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def told(monkeypatch) -> list:
    """What the other one of two processes is told by this one, the first; it has nothing to say itself."""
    said: list = []
    for name, value in {"rank": 0, "size": 2}.items():
        monkeypatch.setattr(Processes, name, value, raising=False)
    monkeypatch.setattr(Processes, "__init__", lambda self: None)
    monkeypatch.setattr(Processes, "gather", lambda self, mine: [said.append(mine) or mine, None])
    return said


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return token_batches()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens, trained on a little of Python's own documentation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([topics["assert"]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny LLaMA with its tokenizer, saved as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Inputs and outputs of the reference's own layer classes (locuslab/wanda at 8e8fc87, CPU, float32)."""
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


@pytest.fixture(scope="session")
def golden_cases() -> list[dict]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["cases"])
