"""A saved model is an ordinary one: transformers alone loads it, and llama.cpp's converter takes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama

from wanda_lightning.checkpoints.loading import load_tokenizer
from wanda_lightning.checkpoints.saving import save_pretrained
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Wanda
from wanda_lightning.sparsity import Unstructured

TEXT = "The capital of France is"
WITHOUT_US = """
import json, sys
sys.modules["wanda_lightning"] = None  # importing it is an error from here on
try:
    import wanda_lightning
except ImportError:
    pass
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    out = model.generate(**tokenizer(sys.argv[1], return_tensors="pt"), max_new_tokens=8, do_sample=False)
    print(json.dumps([model.config.intermediate_size, out[0].tolist(), tokenizer.decode(out[0])]))
"""


def continued(model, tokenizer) -> torch.Tensor:
    """The text and eight tokens more."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0]


def test_transformers_alone_loads_it_and_generates(batches, tokenizer, tmp_path):
    pruned, narrow = tiny_llama(vocab_size=len(tokenizer)), tiny_llama(vocab_size=len(tokenizer), intermediate_size=40)
    prune_model(pruned, batches, Wanda(), Unstructured(0.5))
    for name, model in {"zeros": pruned, "narrow": narrow}.items():
        save_pretrained(model, tokenizer, tmp_path / name)
    command = [sys.executable, "-c", WITHOUT_US, TEXT, "zeros", "narrow"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    for line, model in zip(done.stdout.splitlines(), (pruned, narrow), strict=True):
        width, ids, text = json.loads(line)
        assert width == model.config.intermediate_size
        assert ids == continued(model, tokenizer).tolist()
        assert text == tokenizer.decode(ids)
        assert text.startswith(TEXT)


@pytest.mark.slow
@pytest.mark.skipif(
    not {"SMOLLM2", "LLAMA_CPP"} <= os.environ.keys(),
    reason="SMOLLM2 names no .gguf file, or LLAMA_CPP no folder of llama.cpp's sources (the source archive of "
    "llama-cpp-python has them in vendor/llama.cpp; the test also needs pip install xllamacpp sentencepiece)",
)
@pytest.mark.parametrize("width", [192, 96])
def test_llama_cpp_converts_and_runs_it(tmp_path, width):
    """The tokenizer is a real one: the converter takes none that it does not know."""
    xllamacpp = pytest.importorskip("xllamacpp")
    tokenizer = load_tokenizer(os.environ["SMOLLM2"])
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_llama(2, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=width, **ends)
    prune_model(model, list(torch.randint(0, 1000, (4, 1, 32))), Wanda(), Unstructured(0.5))
    folder = save_pretrained(model, tokenizer, tmp_path / "model")
    script = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    command = [sys.executable, script, folder, "--outfile", tmp_path / "model.gguf", "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(tmp_path / "model.gguf"), 64, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    request = {"prompt": TEXT, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    answer = xllamacpp.Server(settings).handle_completions(request)
    ids = continued(model, tokenizer)
    with torch.no_grad():
        logprobs = model(ids[None, :-1]).logits[0, -8:].log_softmax(-1).gather(1, ids[-8:, None])[:, 0]
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert answer["usage"]["prompt_tokens"] == len(ids) - 8
    assert [token["id"] for token in tokens] == ids[-8:].tolist()
    assert [token["logprob"] for token in tokens] == pytest.approx(logprobs.tolist(), abs=0.02)  # its cache is float16
