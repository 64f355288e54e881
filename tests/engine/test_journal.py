"""A crash costs at most the layer it was at: whatever happens to a run or its files, the next one ends with the same
bytes, and the input model is as it was.
"""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers import digests, tiny_llama, tiny_mixtral, token_batches
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from wanda_lightning.allocation.owl import OWL
from wanda_lightning.checkpoints.loading import load_streamed
from wanda_lightning.engine import layer_file
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import Magnitude, SparseGPT, Wanda
from wanda_lightning.methods.base import ScoreMethod
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.model.offload import stored_parameters
from wanda_lightning.sparsity import SemiStructured, Unstructured

BATCHES = token_batches(batches=3)
HALF = Unstructured(0.5)


class CrashError(Exception):
    pass


@pytest.fixture
def solved(monkeypatch):
    """The calls of the methods' ``prune``; ``solved.limit`` is how many of them work before one crashes."""

    class Solved(list):
        limit = None

    calls = Solved()
    for cls in (ScoreMethod, SparseGPT):

        def prune(self, weight_OI, statistic, pattern, original=cls.prune):
            if calls.limit is not None and len(calls) >= calls.limit:
                raise CrashError
            calls.append(tuple(weight_OI.shape))
            return original(self, weight_OI, statistic, pattern)

        monkeypatch.setattr(cls, "prune", prune)
    return calls


def weights(model) -> str:
    """A digest of all weights, wherever they are."""
    digest = hashlib.sha256()
    for name, values in stored_parameters(model):
        digest.update(name.encode() + values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run(folder, model=None, method=None, pattern=HALF, batches=BATCHES, **settings):
    """Prune with a journal, and give the lock back as the end of a process would."""
    model, journal = model or tiny_llama(), Journal(folder)
    try:
        report = prune_model(model, batches, method or SparseGPT(block_size=16), pattern, journal=journal, **settings)
    finally:
        journal.release()
    return weights(model), report.linears


def without_journal(model=None, method=None, pattern=HALF, **settings):
    model = model or tiny_llama()
    report = prune_model(model, BATCHES, method or SparseGPT(block_size=16), pattern, **settings)
    return weights(model), report.linears


def comparable(rows):
    return [(row.name, row.shape, row.tokens, row.sparsity, row.error, row.damping) for row in rows]


def layer_files(folder) -> list[str]:
    return sorted(file.name for file in Path(folder).glob("layer-*"))


# A run that is interrupted, and goes on.


def test_a_recorded_run_is_restored_without_solving(tmp_path, solved):
    first = run(tmp_path)
    solved.limit = len(solved)
    assert run(tmp_path) == first  # rows and their times as well


MODELS = {
    "llama": lambda: tiny_llama(),
    "bfloat16": lambda: tiny_llama().bfloat16(),
    "mixtral": tiny_mixtral,
}


TWO_PASSES = {"true_sequential": False}


@pytest.mark.parametrize(
    ("method", "settings"),
    [(Magnitude(), {}), (Wanda(), TWO_PASSES), (SparseGPT(block_size=16), TWO_PASSES), (SparseGPT(block_size=16), {})],
    ids=["Magnitude", "Wanda, two passes", "SparseGPT, two passes", "SparseGPT"],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
@pytest.mark.parametrize("model", MODELS)
def test_an_interrupted_run_goes_on_at_its_layer(model, streamed, method, settings, tmp_path, solved):
    MODELS[model]().save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    before = digests(tmp_path / "dense")
    load = load_streamed if streamed else AutoModelForCausalLM.from_pretrained
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    layers = dense.config.num_hidden_layers
    whole = without_journal(dense, method, **settings)
    a_layer = len(solved) // layers

    def start():
        solved.clear()
        return run(tmp_path / "journal", load(str(tmp_path / "dense")), method, **settings)

    for limit in (a_layer + 2, a_layer - 1):  # the first start finishes a layer, the second none
        solved.limit = limit
        with pytest.raises(CrashError):
            start()
        assert layer_files(tmp_path / "journal") == ["layer-00000.safetensors"]
    solved.limit = None
    found, rows = start()
    assert len(solved) == a_layer * (layers - 1)
    assert found == whole[0]
    for row, wanted in zip(comparable(rows), comparable(whole[1]), strict=True):
        assert row[:4] == wanted[:4]
        assert (row[4] or 0) == pytest.approx(wanted[4] or 0, rel=1e-5)  # streamed Hessians come in other passes
    assert digests(tmp_path / "dense") == before


def test_every_layer_in_a_run_of_its_own(tmp_path, solved):
    whole = without_journal()
    a_layer = len(solved) // 3
    for finished in range(3):
        solved.clear()
        solved.limit = a_layer
        if finished < 2:
            with pytest.raises(CrashError):
                run(tmp_path)
            assert len(layer_files(tmp_path)) == finished + 1
    last = run(tmp_path)
    assert len(solved) == a_layer
    assert (last[0], comparable(last[1])) == (whole[0], comparable(whole[1]))


def test_it_says_what_it_goes_on_from(tmp_path, solved, caplog):
    solved.limit = 10
    with pytest.raises(CrashError):
        run(tmp_path)
    assert "finished before" not in caplog.text
    with pytest.raises(CrashError):
        run(tmp_path)
    assert f"layers finished before: 1, in {tmp_path}" in caplog.text


# A folder of another run.


class Doubled(ScoreMethod):
    """A method as a user may write it: without a name of its own."""

    statistic = None

    def __init__(self, power=2):
        self.power = power

    def score(self, weight_OI, statistic):
        return weight_OI.abs() ** self.power


def other_weights():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data *= 1.01
    return model


def eager():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    return model


OTHERS = {
    "method": ({"method": Wanda()}, "SparseGPT(block_size=16, damping=0.01)' there, 'Wanda(variant=False)' now"),
    "setting": ({"method": SparseGPT(block_size=8)}, "block_size=16, damping=0.01)' there, 'SparseGPT(block_size=8"),
    "sparsity": ({"pattern": Unstructured(0.25)}, "sparsity: 0.5 there, 0.25 now"),
    "pattern": ({"pattern": SemiStructured(2, 4)}, "pattern: 'unstructured' there, '2:4' now"),
    "targets": ({"targets": ["q_proj"]}, "targets: None there, ['q_proj'] now"),
    "ignore": ({"ignore": ["q_proj"]}, "ignore: None there, ['q_proj'] now"),
    "allocation": ({"allocation": {"q_proj": 0.25}}, "allocation: None there, {'q_proj': 0.25} now"),
    "allocator": ({"allocation": OWL()}, "allocation: None there, 'OWL(factor=5.0, spread=0.08)' now"),
    "error": ({"exact_error": True}, "exact_error: False there, True now"),
    "passes": ({"true_sequential": False}, "true_sequential: True there, None now"),
    "calibration": ({"batches": token_batches(batches=3, seed=2)}, "calibration: ["),
    "order": ({"batches": BATCHES[::-1]}, "calibration: ["),
    "batch size": ({"batches": [torch.cat(BATCHES)]}, "calibration: ["),
    "buffers": ({"model": lambda: tiny_llama().bfloat16().float()}, "weights: '"),
    "weights": ({"model": other_weights}, "has to be loaded again"),
    "dtype": ({"model": lambda: tiny_llama().bfloat16()}, "shapes: '"),
    "model": ({"model": tiny_mixtral}, "model: 'LlamaForCausalLM' there, 'MixtralForCausalLM' now"),
    "attention": ({"model": eager}, "attention: 'sdpa' there, 'eager' now"),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    run(folder)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_refused_and_nothing_changed(other, recorded, solved):
    settings, said = OTHERS[other]
    model = settings.get("model", tiny_llama)()
    dense, before = weights(model), contents(recorded)
    with pytest.raises(ValueError, match="holds the finished layers of another run") as refused:
        run(recorded, **{**settings, "model": model})
    assert said in str(refused.value)
    assert ("has to be loaded again" in str(refused.value)) == ("weights: '" in str(refused.value))
    assert str(recorded) in str(refused.value)
    assert "delete the folder" in str(refused.value)
    assert contents(recorded) == before
    assert weights(model) == dense
    assert not solved


def test_a_run_of_two_passes_does_not_go_on_from_one_of_one(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"another run.*true_sequential: True there, None now"):
        run(tmp_path, **TWO_PASSES)


def test_another_precision_is_refused(recorded):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"autocast: None there, 'torch.bfloat"):
        run(recorded)


def test_other_versions_are_refused(recorded, tmp_path):
    now = version("torch")  # of the package: without the +cu130 that torch.__version__ may have
    (tmp_path / "run.json").write_text((recorded / "run.json").read_text().replace(f'"{now}"', '"1.0"'))
    with pytest.raises(ValueError, match=re.escape(f"torch: '1.0' there, '{now}' now")):
        run(tmp_path)


def test_only_what_differs_is_named(recorded):
    with pytest.raises(ValueError) as refused:
        run(recorded, pattern=Unstructured(0.25))
    assert str(refused.value).count(" there, ") == 1


def test_a_method_of_the_users_own_is_known_again(tmp_path, solved):
    first = run(tmp_path, method=Doubled())
    solved.limit = len(solved)
    assert run(tmp_path, method=Doubled()) == first
    with pytest.raises(ValueError, match=r"'Doubled\(power=2\)' there, 'Doubled\(power=3\)' now"):
        run(tmp_path, method=Doubled(3))


# Damage.


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def flip_in(file: Path, text: bytes) -> None:
    flip(file, file.read_bytes().index(text) + len(text))


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "header only": lambda file: file.write_bytes(file.read_bytes()[:8]),
    "no safetensors": lambda file: file.write_bytes(b"x" * 5000),
    "data": lambda file: flip(file, -1),
    "size of the header": lambda file: flip(file, 0),
    "start of the header": lambda file: flip(file, 8),
    "rows": lambda file: flip_in(file, b'\\"sparsity\\": 0.'),
    "sum": lambda file: flip_in(file, b'"sha256":"'),
    "name": lambda file: flip_in(file, b"model.layers.1.mlp.up_proj.weigh"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_layer_and_those_behind_it_are_pruned_again(damage, tmp_path, solved, caplog):
    whole = run(tmp_path)
    a_layer = len(solved) // 3
    solved.clear()
    first = (tmp_path / "layer-00000.safetensors").stat().st_mtime_ns
    DAMAGE[damage](tmp_path / "layer-00001.safetensors")
    again = run(tmp_path)
    assert len(solved) == 2 * a_layer
    assert (again[0], comparable(again[1])) == (whole[0], comparable(whole[1]))
    assert "layer-00001.safetensors is damaged" in caplog.text
    assert (tmp_path / "layer-00000.safetensors").stat().st_mtime_ns == first
    solved.limit = len(solved)
    assert run(tmp_path) == again  # the damaged file was replaced


def test_of_a_missing_layer_too_those_behind_it_go(tmp_path, solved):
    whole = run(tmp_path)
    a_layer = len(solved) // 3
    solved.clear()
    (tmp_path / "layer-00001.safetensors").unlink()
    assert run(tmp_path)[0] == whole[0]
    assert len(solved) == 2 * a_layer


def test_files_that_a_killed_run_left_go(tmp_path, solved, monkeypatch):
    half_written, replace = [".tmpAb3xY9"], os.replace  # that of safetensors
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda file, to: (half_written.append(Path(file).name), replace(file, to)))
        whole = run(tmp_path, allocation=OWL())
    assert len(half_written) == 1 + len(contents(tmp_path).keys() - {"lock"})
    solved.limit = len(solved)
    for name in half_written:
        (tmp_path / name).write_bytes(b"half")
    assert run(tmp_path, allocation=OWL()) == whole
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("content", ['{"model": "Lla', "", "3", "\x00" * 50])
def test_a_damaged_description_is_refused(content, tmp_path):
    run(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json is damaged .*Delete .* and the run starts over"):
        run(tmp_path)
    assert len(layer_files(tmp_path)) == 3


def test_layers_of_nobody_knows_which_run_are_not_used(tmp_path, solved):
    whole = run(tmp_path)
    number = len(solved)
    (tmp_path / "run.json").unlink()
    assert run(tmp_path, pattern=Unstructured(0.25))[0] != whole[0]
    assert len(solved) == 2 * number


# A disk that is full.


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_by_safetensors(*_, **__):
    raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")


@pytest.mark.parametrize(
    ("where", "name", "failure"),
    [
        (layer_file, "save_file", full),
        (layer_file, "save_file", full_by_safetensors),
        (os, "replace", full),
        (os, "fsync", full),
    ],
)
def test_a_full_disk_keeps_what_is_finished(where, name, failure, tmp_path, solved):
    whole = without_journal()
    a_layer = len(solved) // 3
    solved.clear()
    with pytest.MonkeyPatch.context() as patch:
        journal = Journal(tmp_path)
        record = journal.record

        def second(number, *args):
            if number == 1:
                patch.setattr(where, name, failure)
            record(number, *args)
            assert number == 0

        journal.record = second
        with pytest.raises(OSError, match=r"layer 1 cannot be written to .*No space left.*1 layers before it are kept"):
            prune_model(tiny_llama(), BATCHES, SparseGPT(block_size=16), HALF, journal=journal)
        journal.release()
    assert layer_files(tmp_path) == ["layer-00000.safetensors"]
    assert not [*tmp_path.glob(".*")]
    solved.clear()
    again = run(tmp_path)
    assert len(solved) == 2 * a_layer
    assert (again[0], comparable(again[1])) == (whole[0], comparable(whole[1]))


def test_a_disk_that_is_full_before_the_first_layer(tmp_path, monkeypatch):
    model = tiny_llama()
    dense = weights(model)
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, model)
    assert weights(model) == dense
    monkeypatch.undo()
    assert run(tmp_path, model)[0] == without_journal()[0]


# One run at a time.

HOLDER = """
import sys, time
from wanda_lightning.engine.journal import Journal
journal = Journal(sys.argv[1])
journal.lock()
print("locked", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of ``tmp_path / "unfinished"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "unfinished"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_until_the_first_is_gone(holder, tmp_path):
    model = tiny_llama()
    dense = weights(model)
    with pytest.raises(ValueError, match=f"another run is writing to {tmp_path}: wait for it, or choose another"):
        run(tmp_path / "unfinished", model)
    with pytest.raises(ValueError, match="another run is writing"):
        Journal(tmp_path / "unfinished").remove()
    assert weights(model) == dense
    assert [*contents(tmp_path / "unfinished")] == ["lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run(tmp_path / "unfinished", model)[0] == without_journal()[0]


def test_one_process_may_go_on_with_its_own_run(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path / "." / ".." / tmp_path.name)
    for journal in (first, second):
        prune_model(tiny_llama(), BATCHES, Wanda(), HALF, journal=journal)
    first.remove()
    assert not tmp_path.exists()
    second.remove()


def test_what_was_removed_is_begun_anew(tmp_path, solved):
    run(tmp_path)
    number = len(solved)
    Journal(tmp_path).remove()
    run(tmp_path)
    assert len(solved) == 2 * number


def test_a_folder_that_is_no_journal_is_not_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("not finished")
    Journal(tmp_path).remove()
    with pytest.raises(ValueError, match=r"holds files of another kind, such as thesis.txt"):
        run(tmp_path)
    assert [*contents(tmp_path)] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["layer-notes.txt", "run.json.bak", "lockers", "layer-best.safetensors"])
def test_names_that_begin_like_those_of_a_journal_are_not(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds files of another kind, such as {name}"):
        Journal(tmp_path).lock()


def contents_of_all(folder) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_file_that_cannot_be_deleted_is_no_reason_to_fail(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "unfinished")
    journal.lock()
    monkeypatch.setattr(Path, "unlink", full)  # as on Windows, where another program has it open
    journal.release()
    assert (tmp_path / "unfinished").exists()


@pytest.mark.parametrize("was_there", [False, True])
def test_the_folder_around_a_journal_stays_if_it_was_there(was_there, tmp_path):
    around = tmp_path / "results"
    if was_there:
        around.mkdir()
    journal = Journal(around / "unfinished")
    journal.lock()
    journal.release()
    assert around.exists() == was_there
    journal.start({}, Processes())
    journal.release()
    journal.remove()
    assert around.exists() == was_there


def locked_and_released(folder):
    journal = Journal(folder)
    journal.lock()
    journal.release()


def run_and_removed(folder):
    run(folder)
    Journal(folder).remove()


def test_the_home_folder_may_be_written_as_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Journal("~/unfinished").folder == tmp_path / "unfinished"


@pytest.mark.parametrize("use", [locked_and_released, run_and_removed])
def test_hidden_files_of_others_stay(use, tmp_path):
    for name in (".git/config", ".env", ".eslintrc.json", ".model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents_of_all(tmp_path)
    use(tmp_path)
    assert contents_of_all(tmp_path) == before


def test_a_file_that_came_while_the_run_went_on_stays(tmp_path):
    journal = Journal(tmp_path / "unfinished")
    prune_model(tiny_llama(), BATCHES, Wanda(), HALF, journal=journal)
    (tmp_path / "unfinished" / "notes.txt").write_text("mine")
    journal.remove()
    assert [*contents(tmp_path / "unfinished")] == ["notes.txt"]


@pytest.mark.parametrize("step", ["lock", "release", "remove"])
def test_a_journal_that_keeps_nothing_can_be_asked_for_all_that_others_can(step):
    assert getattr(Journal.none(), step)() is None


def test_the_description_is_for_people(recorded):
    found = json.loads((recorded / "run.json").read_text())
    assert found["method"] == "SparseGPT(block_size=16, damping=0.01)"
    assert (found["pattern"], found["sparsity"], found["device"]) == ("unstructured", 0.5, "cpu")


def test_other_processes_hear_of_a_layer_that_cannot_be_deleted(tmp_path, told):
    (tmp_path / "layer-00001.safetensors").mkdir()
    with pytest.raises(OSError):
        Journal(tmp_path).restore(0, decoder_layers(tiny_llama())[0], Processes())
    assert isinstance(told[-1], OSError)
