"""Mistakes of the user are one short message, whatever the class of the error; our own keep their traceback."""

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from wanda_lightning.__main__ import main
from wanda_lightning.cli.messages import exit_code, explained


@pytest.fixture
def run(tiny_model_folder, tmp_path, monkeypatch, capsys):
    """Prune a copy of the tiny model that was changed; returns the exit code and what was said of it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, "model")

    def pruned(*more):
        monkeypatch.setattr(sys, "argv", [
            "wanda-lightning", "prune", "-c", "wanda", "--model.pretrained=model", "--data.num_samples=4",
            "--data.sequence_length=16", "--data.max_evaluation_windows=2", "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu", *more,
        ])  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr().err.partition("wanda-lightning: error: ")[2]

    return pruned


def config_with(**changes) -> str:
    with open("model/config.json") as file:
        return json.dumps(json.load(file) | changes)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        print("its own code has run")
"""


@pytest.fixture
def own_code(run):
    """Give the model code of its own."""
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    changed = config_with(model_type="own_llama", auto_map=own)
    Path("model/config.json").write_text(changed)
    Path("model/own.py").write_text(CODE)


def test_code_of_the_model_s_own_is_named(run, own_code):
    code, message = run()
    assert code == 2
    assert re.match(
        "The repository model contains custom code .*: look at it, and add --trust_remote_code true", message
    )


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "model", "--num_samples=1"],
        ["generate", "model", "t1 t2", "--tokens=1"],
        ["speed", "model", "--prompt=4", "--new_tokens=1", "--rounds=1", "--batch_sizes=[1]"],
        ["validate", "model", "--sequence_length=16", "--data.max_evaluation_windows=2", "--trainer.logger=false"],
    ],
    ids=lambda command: command[0],
)
def test_code_of_the_model_s_own_runs_if_it_is_trusted(own_code, monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["wanda-lightning", *command, "--trust_remote_code=true"])
    main()
    assert "its own code has run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "model.safetensors",
            b"\x10\0\0\0\0\0\0\0not json",
            "model.safetensors is cut off, or no safetensors file .*header",
        ),
        ("config.json", b"[1, 2]", "Unrecognized model"),
        ("config.json", b"{", "not a valid JSON file"),
        ("config.json", b"{}", "Unrecognized model"),
        ("config.json", lambda: config_with(model_type="llama99"), "model type `llama99`"),
        ("config.json", lambda: config_with(hidden_size="big"), "'hidden_size' expected int"),
        ("tokenizer.json", b"{}", "cannot be read: .*KeyError"),
        ("config.json", None, "holds no config.json"),
        ("model.safetensors", None, "no file named model.safetensors"),
    ],
)
def test_broken_files_of_a_model(run, tmp_path, file, content, message):
    path = tmp_path / "model" / file
    if callable(content):
        path.write_text(content())
    elif content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    code, said = run()
    assert code == 2
    assert re.search(message, said)
    assert len(said.splitlines()) <= 6


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.attn_implementation=flash_attention_2", "a package is missing.*FlashAttention2"),
        ("--model.attn_implementation=nonsense", 'attn_implementation="nonsense"` is not supported'),
    ],
)
def test_options_that_transformers_refuses(run, option, message):
    code, said = run(option)
    assert code == 2
    assert re.search(message, said)
    assert len(said.splitlines()) <= 6


def raised(error: Exception, *modules: str) -> Exception:
    """The error, as if functions of these modules had called one another and the last had raised it."""
    scopes = [{"__name__": module} for module in modules]
    for scope, inner in zip(scopes, [*scopes[1:], None], strict=True):
        scope.update(inner=inner, error=error)
        exec("def call():\n    if inner is None: raise error.with_traceback(None)\n    inner['call']()", scope)
    with pytest.raises(type(error)) as caught:
        scopes[0]["call"]()
    return caught.value


READING = ["wanda_lightning.checkpoints.loading", "wanda_lightning.data.sources", "wanda_lightning.evaluation.tasks",
           "lightning.pytorch.trainer.connectors.accelerator_connector",
           "lightning.pytorch.trainer.connectors.checkpoint_connector"]  # fmt: skip


@pytest.mark.parametrize("reader", READING)
@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), TypeError("x"), AttributeError("x")])
def test_whatever_others_raise_while_they_read_is_about_what_was_named(reader, error):
    assert "cannot be read" in explained(raised(error, "__main__", "wanda_lightning.cli", reader, "library.files"))


def test_what_lightning_says_of_a_checkpoint_is_about_what_was_named():
    error = KeyError("checkpoint contains only the model")
    assert "checkpoint contains only the model" in explained(raised(error, "wanda_lightning.cli", READING[-1]))


@pytest.mark.parametrize(
    "modules",
    [
        ["wanda_lightning.engine.pruner"],
        ["wanda_lightning.engine.pruner", "torch.nn.functional"],
        ["wanda_lightning.checkpoints.loading"],
        ["wanda_lightning.checkpoints.loading", "library.files", "wanda_lightning.engine.pruner", "torch"],
        ["wanda_lightning.checkpoints.saving", "safetensors"],
        [READING[-1], "lightning.pytorch.callbacks", "wanda_lightning.callbacks.pruning", "torch"],
        ["library"],
    ],
)
def test_what_we_raise_ourselves_is_no_mistake_of_the_user(modules):
    assert explained(raised(KeyError("x"), *modules)) is None


def test_a_missing_package_is_named_unless_it_is_ours():
    assert "No module named 'peft'" in explained(ModuleNotFoundError("No module named 'peft'", name="peft"))
    assert explained(ModuleNotFoundError("No module named 'wanda_lightning.x'", name="wanda_lightning.x")) is None


FULL = [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("sparsity"), 2),
        (FileNotFoundError(2, "no such file"), 2),
        (PermissionError(13, "not allowed"), 2),
        (ImportError("peft"), 2),
        (ConnectionError("the hub"), 1),
        (TimeoutError("the hub"), 1),
        *((OSError(number, os.strerror(number)), 1) for number in FULL),
        *((RuntimeError(f"Error while serializing: I/O error: x (os error {number})"), 1) for number in FULL),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
    ],
)
def test_mistakes_exit_with_2_and_failures_with_1(error, code):
    assert exit_code(error) == code
    assert explained(error)
