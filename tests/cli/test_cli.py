"""The command line as users run it."""

import io
import json
import logging
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import wanda_lightning
from wanda_lightning.__main__ import main
from wanda_lightning.cli.commands import COMMANDS
from wanda_lightning.cli.messages import explained
from wanda_lightning.cli.parser_messages import shortened

RECIPE = Path(wanda_lightning.__file__).parent / "recipes" / "wanda.yaml"
MODEL = "--model.pretrained=MODEL"


@pytest.fixture
def wanda_lightning_command(monkeypatch, tmp_path):
    """Run the command in this process (importing Lightning takes seconds), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["wanda-lightning", *map(str, arguments)])
        stdout, stderr = io.StringIO(), io.StringIO()
        code = 0
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
        return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())

    return command


def test_the_module_runs_in_a_process_of_its_own(tmp_path):
    command = [
        sys.executable,
        "-m",
        "wanda_lightning",
        "prune",
        "-c",
        "wanda",
        "--model.pretrained=MODEL",
        "--data.nothing=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Option 'nothing' is not accepted" in done.stderr
    assert "run: wanda-lightning prune --help" in done.stderr


@pytest.mark.slow
def test_two_processes_prune_and_finetune(small, tmp_path):
    """Started by Lightning's own launcher, each with the command line of the first."""
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    command = [sys.executable, "-m", "wanda_lightning", "fit", "-c", "wanda_finetune", *small, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Results are in") == 1
    report = json.loads((tmp_path / "results/pruning.json").read_text())
    assert [stage["sparsity"] for stage in report["evaluations"].values()] == [0.0, 0.5, 0.5]
    assert (tmp_path / "results/model/model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_search_and_save(small, tmp_path):
    """The trials and the last pruning, which is saved, are the same in both."""
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--step=0.25"]
    options += ["--max_perplexity_increase=100", "--held_out_windows=4"]
    command = [sys.executable, "-m", "wanda_lightning", "search", "-c", "search", *small, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "results/search.json").read_text())["found"] == 0.75
    weights = load_file(tmp_path / "results/model/model.safetensors")
    pruned = [weight for name, weight in weights.items() if name.endswith("_proj.weight")]
    assert {(weight == 0).double().mean().item() for weight in pruned} == {0.75}


@pytest.fixture
def small(tiny_model_folder, tmp_path) -> list[str]:
    """Options that make the recipe run on the tiny model."""
    return [
        f"--model.pretrained={tiny_model_folder}",
        "--data.num_samples=4",
        "--data.sequence_length=16",
        "--data.max_evaluation_windows=2",
        f"--trainer.default_root_dir={tmp_path / 'results'}",
    ]


def test_the_model_of_an_earlier_run_is_not_named_among_results(wanda_lightning_command, small):
    saved = wanda_lightning_command("prune", "-c", RECIPE, *small)
    assert saved.stdout.splitlines()[-1].endswith(": report.html, model")
    other = wanda_lightning_command("prune", "-c", RECIPE, *small, "--save=false")
    assert other.stdout.splitlines()[-1].endswith(": report.html")


def test_a_model_that_is_not_to_be_saved_leaves_no_layers(wanda_lightning_command, small, tmp_path):
    for sparsity in (0.5, 0.6):
        done = wanda_lightning_command(
            "prune", "-c", RECIPE, *small, f"--sparsity={sparsity}", "--save=false", "--overwrite"
        )
        assert done.returncode == 0, done.stderr
    assert not [*tmp_path.rglob("unfinished")]


def test_prune_twice_into_the_same_folder(wanda_lightning_command, small, tmp_path):
    for _ in range(2):
        done = wanda_lightning_command("prune", "-c", RECIPE, *small)
        assert done.returncode == 0, done.stderr
    assert "val/perplexity" in done.stdout
    assert f"Results are in {tmp_path / 'results'}" in done.stdout
    written = sorted(p.name for p in (tmp_path / "results").iterdir())
    assert written == ["config.yaml", "model", "pruning.json", "pruning.md", "report.html"]
    # The configuration beside the results gives the same results.
    report = json.loads((tmp_path / "results/pruning.json").read_text())
    config = tmp_path / "config.yaml"
    (tmp_path / "results/config.yaml").rename(config)
    again = wanda_lightning_command("prune", "-c", config, f"--trainer.default_root_dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    repeated = json.loads((tmp_path / "again/pruning.json").read_text())
    assert repeated["evaluations"] == report["evaluations"]


def test_validate_the_saved_model(wanda_lightning_command, small, tmp_path):
    done = wanda_lightning_command("prune", "-c", RECIPE, *small)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "results/pruning.json").read_text())
    model = f"--model.pretrained={tmp_path / 'results/model'}"
    done = wanda_lightning_command("validate", model, "--trainer.logger=false", *small[2:4])
    assert done.returncode == 0, done.stderr
    shown = next(line for line in done.stdout.splitlines() if "val/perplexity" in line)
    assert str(report["evaluations"]["pruned"]["val/perplexity"])[:8] in shown


@pytest.mark.parametrize(
    ("options", "written"),
    [([], set()), (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"], {"logs"})],
)
def test_an_evaluation_writes_logs_where_they_are_asked_for(wanda_lightning_command, small, tmp_path, options, written):
    done = wanda_lightning_command("validate", *small[:1], *small[2:4], *options)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == written


@pytest.mark.parametrize("recipe", ["distill", "wanda_lora"])
def test_a_resumed_run_keeps_its_settings_and_ends_the_same(wanda_lightning_command, small, tmp_path, recipe):
    """The checkpoint holds few of them: neither the teacher nor the adapters, and no learning rate."""

    def fit(folder, *more):
        saving = ["--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"]
        saving += ["--trainer.callbacks.every_n_train_steps=3", "--trainer.callbacks.save_top_k=-1"]
        options = [*small[:4], f"--trainer.default_root_dir={folder}", *saving, "--trainer.max_steps=4", *more]
        dropout = ["--model.lora.dropout=0"] if recipe == "wanda_lora" else []  # no checkpoint holds the random state
        done = wanda_lightning_command("fit", "-c", RECIPE.with_name(f"{recipe}.yaml"), *options, *dropout)
        assert done.returncode == 0, done.stderr
        config = yaml.safe_load((folder / "config.yaml").read_text())
        return config["model"], (folder / "model/model.safetensors").read_bytes()

    whole = fit(tmp_path / "whole")
    (checkpoint,) = (tmp_path / "whole").rglob("*step=3.ckpt")
    assert fit(tmp_path / "resumed", f"--ckpt_path={checkpoint}") == whole


def test_a_run_that_leaves_no_files_names_none(wanda_lightning_command, small):
    done = wanda_lightning_command("fit", "-c", RECIPE, *small, "--trainer.fast_dev_run=true")
    assert (done.returncode, "are zero" in done.stdout, "Results are in" in done.stdout) == (0, True, False)


def test_print_config(wanda_lightning_command, small):
    done = wanda_lightning_command("prune", "-c", RECIPE, *small, "--print_config")
    assert done.returncode == 0
    config = yaml.safe_load(done.stdout)
    assert config["trainer"]["callbacks"][0]["class_path"] == "wanda_lightning.WandaPruning"
    assert config["data"]["init_args"]["num_samples"] == 4


def test_a_part_of_the_default_optimizer_can_be_changed(wanda_lightning_command):
    done = wanda_lightning_command("prune", "MODEL", "--model.optimizer.weight_decay=0.5", "--print_config")
    optimizer = yaml.safe_load(done.stdout)["model"]["init_args"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (1e-5, 0.5)


def test_short_names_on_the_command_line(wanda_lightning_command, small, tmp_path):
    added = ["--trainer.callbacks+=WandaPruning", "--trainer.callbacks.pattern=1:4"]
    dense = tmp_path / "dense.yaml"
    dense.write_text("trainer: {logger: false}\nmodel: {class_path: CausalLM}\ndata: {class_path: TextDataModule}\n")
    done = wanda_lightning_command("prune", "-c", dense, *small, *added)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results/pruning.json").read_text())["sparsity"] == 0.75


def test_the_short_way(wanda_lightning_command, tiny_model_folder, tmp_path):
    """Does what the recipe does with the same settings."""
    data = tmp_path / "mine.txt"
    data.write_text("Sparse matrices are matrices with zeros, and zeros need not be multiplied. " * 300)
    size = ["--num_samples", "4", "--sequence_length", "16", "--data.max_evaluation_windows=2"]
    short = ["--method", "magnitude", "--pattern", "1:4", "--data", data, "--output", "short"]
    done = wanda_lightning_command("prune", tiny_model_folder, *short, *size, "-v")
    assert done.returncode == 0, done.stderr
    assert "model.layers.2" in done.stdout
    long = [f"--model.pretrained={tiny_model_folder}", f"--data.source={data}"]
    long += ["--trainer.callbacks.sparsity=0.75", "--trainer.callbacks.pattern=1:4"]
    long += ["--data.num_samples=4", "--data.sequence_length=16", size[-1], "--trainer.default_root_dir=long"]
    done = wanda_lightning_command("prune", "-c", "magnitude", *long)
    assert done.returncode == 0, done.stderr
    assert "model.layers.2" not in done.stdout
    reports = [json.loads((tmp_path / folder / "pruning.json").read_text()) for folder in ("short", "long")]
    assert reports[0]["sparsity"] == 0.75
    assert reports[0]["evaluations"] == reports[1]["evaluations"]
    weights = [(tmp_path / folder / "model/model.safetensors").read_bytes() for folder in ("short", "long")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "command",
    [
        ("fit", "-c", "wanda_finetune", "--max_steps=1"),
        ("search", "--method=magnitude", "--step=0.5", "--max_perplexity_increase=9"),
        ("prune", "-c=magnitude", "--trainer.enable_model_summary=true"),
        ("prune", "-c=magnitude", "--trainer.callbacks+=RichProgressBar", "--trainer.callbacks+=ModelSummary"),
    ],
)
def test_quiet(wanda_lightning_command, small, command):
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    try:
        done = wanda_lightning_command(*command, *small, "-q")
    finally:
        logger.setLevel(level)  # the command's process would end here
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_the_short_way_is_shown_in_long(wanda_lightning_command):
    done = wanda_lightning_command("prune", "MODEL", "--sparsity", "0.6", "--data", "mine.txt", "--print_config")
    config = yaml.safe_load(done.stdout)
    assert config["trainer"]["callbacks"][0]["init_args"]["sparsity"] == 0.6
    assert config["trainer"]["default_root_dir"] == "results/wanda"
    assert config["model"]["init_args"]["pretrained"] == "MODEL"
    assert config["data"]["init_args"]["source"] == "mine.txt"


def edited(tmp_path, old: str, new: str) -> Path:
    text = RECIPE.read_text()
    assert old in text
    (tmp_path / "edited.yaml").write_text(text.replace(old, new))
    return tmp_path / "edited.yaml"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sparsity: 0.5", "pattern: 2:4", 'write pattern: "2:4"'),
        ("sparsity: 0.5", "sparsty: 0.5", "Option 'sparsty' is not accepted"),
        ("sparsity: 0.5", "sparsity: half", "Given value: half"),
        ("sparsity: 0.5", "sparsity: 1.5", "sparsity must be a number in [0, 1), got 1.5"),
        ("source: builtin", "source: missing.txt", "the file 'missing.txt' does not exist"),
        ("num_samples: 128", "num_samples: 0", "num_samples must be"),
        ("class_path: WandaPruning", "class_path: WandaPrunin", "did you mean WandaPruning?"),
    ],
)
def test_mistakes_in_a_recipe_are_one_short_message(wanda_lightning_command, small, tmp_path, old, new, message):
    arguments = [option for option in small if "num_samples" not in option]
    done = wanda_lightning_command("prune", "-c", edited(tmp_path, old, new), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 8
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune"], "no model was given: name it first"),
        (["prune", "-c", RECIPE], "no model was given: name it first"),
        (["prune", "-c", RECIPE, MODEL, "--data.num_sample=3"], "what is accepted: --data.help TextDataModule"),
        (["prune", "-c", RECIPE, MODEL, "--trainer.max_stepz=3"], "unrecognized arguments: --trainer.max_stepz"),
        (["prune", "-c", RECIPE, MODEL, "--trainer.max_stepz=3"], "did you mean --trainer.max_steps?"),
        (["prune", "-c", RECIPE, MODEL, "--data.num_sample=3"], "did you mean --data.num_samples?"),
        (["prune", "-c", RECIPE, MODEL, "--trainer.callbacks.sparsty=1"], "did you mean --trainer.callbacks.sparsity?"),
        (["prune", "MODEL", "--sparsty", "0.6"], "did you mean --sparsity?"),
        (["fit", "MODEL", "--lr", "1e-4"], "did you mean --model.optimizer.lr?"),
        (
            ["prune", MODEL, "--trainer.callbacks+=WandaPrunin"],
            'error: Parser key "trainer.callbacks":\n    Expected a dot import path string: WandaPrunin\n',
        ),
        (["prune", MODEL, "--trainer.callbacks+=mine.yaml"], "Expected a path but mine.yaml"),
        (
            ["prune", MODEL, "--trainer.callbacks.sparsity=0.6"],
            "error: there is no callback that sparsity is an option of",
        ),
        (
            ["prune", "-c", RECIPE, MODEL, "--trainer.callbacks.activations=gpu"],
            "activations must be one of device, cpu, disk, got 'gpu'",
        ),
        (["sweep", "MODEL", "--methods=[wnda]"], "error: --methods must be one of magnitude, wanda, sparsegpt, ablate"),
        (["sweep", "MODEL", "--methods=[wnda]"], "got 'wnda'; did you mean wanda?\n"),
        (
            ["sweep", "MODEL", "--methods=wanda"],
            "error: --methods must be a list such as '[wanda, sparsegpt]'; got wanda",
        ),
        (["sweep", "MODEL", "--methods=[{class_path: Wanda, init_args: {a: 1}}]"], "Option 'a' is not accepted"),
        (["sweep", "MODEL", "--sparsities=0.4"], "error: --sparsities must be a list such as '[0.4, 0.6]'; got 0.4"),
        (
            ["sweep", "MODEL", "--patterns=[2:4]"],
            "error: --patterns must be a list such as '[\"2:4\"]', with these quotes",
        ),
        (
            ["sweep", "MODEL", "--patterns=2:4"],
            "'[\"2:4\"]', with these quotes: a bare 2:4 is the number 124 in YAML; got 2:4",
        ),
    ],
)
def test_mistakes_on_the_command_line(wanda_lightning_command, arguments, message):
    done = wanda_lightning_command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 8


def test_the_class_that_was_meant_is_named_once(wanda_lightning_command):
    done = wanda_lightning_command("prune", "-c", RECIPE, MODEL, "--trainer.callbacks.allocation=OWLL")
    assert done.stderr.count("did you mean OWL?") == 1


def test_a_missing_model_says_what_was_tried(wanda_lightning_command, small):
    done = wanda_lightning_command("prune", "-c", RECIPE, *small, "--model.pretrained=nobody/nothing")
    assert done.returncode == 2
    assert "cannot load the config of 'nobody/nothing'" in done.stderr
    assert "Traceback" not in done.stderr


def test_windows_longer_than_the_model_are_refused_before_pruning(wanda_lightning_command, small, tmp_path):
    done = wanda_lightning_command("prune", "-c", RECIPE, *small, "--data.sequence_length=129")
    assert done.returncode == 2
    assert "sequence_length must be at most 128" in done.stderr
    assert not (tmp_path / "results/pruning.json").exists()


def test_help_and_version(wanda_lightning_command):
    assert wanda_lightning_command("--version").stdout == f"wanda-lightning {wanda_lightning.__version__}\n"
    done = wanda_lightning_command("prune", "--help")
    assert done.returncode == 0
    assert "--trainer.max_steps" not in done.stdout
    whole = wanda_lightning_command("prune", "--help-all").stdout
    assert "--trainer.max_steps" in whole
    assert done.stdout.partition("\n\n")[2].strip() in whole
    assert "--data.source" in wanda_lightning_command("prune", "--data.help=TextDataModule").stdout
    assert "sparsity" in wanda_lightning_command("prune", "--trainer.callbacks.help=WandaPruning").stdout


def test_other_messages_are_not_shortened():
    assert shortened("sparsity must be\n  Given value: 3") == "sparsity must be\n  Given value: 3"


def test_a_saved_model_is_inspected_shipped_and_restored(wanda_lightning_command, tiny_model_folder, tmp_path):
    assert wanda_lightning_command("compress", tiny_model_folder, "small").returncode == 0
    assert wanda_lightning_command("decompress", "small", "again").returncode == 0
    done = wanda_lightning_command("inspect", "again")
    assert done.returncode == 0
    assert "Loads with transformers" in done.stdout
    done = wanda_lightning_command("compress", "nowhere", "small")
    assert done.returncode == 2
    assert "error: no such folder: nowhere" in done.stderr
    (tmp_path / "again/model.safetensors").write_bytes(b"not this")
    done = wanda_lightning_command("inspect", "again")
    assert done.returncode == 2
    assert "model.safetensors is cut off, or no safetensors file" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_starts_with_a_sentence_and_an_example(wanda_lightning_command, name):
    done = wanda_lightning_command(name, "--help")
    assert done.returncode == 0
    usage, purpose, example, *_ = done.stdout.split("\n\n")
    assert usage.startswith(f"usage: wanda-lightning {name} ")
    assert purpose == COMMANDS[name].purpose
    assert example.startswith(f"  wanda-lightning {name} ")
    assert COMMANDS[name].purpose in wanda_lightning_command("--help").stdout


def test_a_wrong_value_on_the_command_line_is_not_blamed_on_the_option(wanda_lightning_command, small):
    done = wanda_lightning_command("prune", "-c", RECIPE, *small, "--trainer.callbacks.sparsity=half")
    assert "Expected a float" in done.stderr
    assert "Given value: half" in done.stderr
    assert "not accepted" not in done.stderr


def test_a_command_that_is_not_there(wanda_lightning_command):
    done = wanda_lightning_command("prun")
    assert done.returncode == 2
    assert "there is no command 'prun', it is one of prune, fit," in done.stderr


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(wanda_lightning_command, small):
    done = wanda_lightning_command("prune", "-c", RECIPE, *small, "--model.pretrained=./no/such")
    assert "error: there is no folder './no/such'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(wanda_lightning_command, small):
    done = wanda_lightning_command("prune", "-c", RECIPE, *small, "--trainer.accelerator=gpu")
    assert done.returncode == 2
    assert "error: no GPU was found" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_without_a_pruning_callback(wanda_lightning_command, small):
    done = wanda_lightning_command("prune", *small, "--trainer.logger=false")
    assert done.returncode == 2
    assert "-c wanda" in done.stderr


def raised_by(function) -> Exception:
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def on_a_full_disk():
    with open("/dev/full", "w") as file:
        file.write("a")


def test_too_little_memory_says_what_takes_less():
    on_a_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    for error in (on_a_gpu, raised_by(lambda: torch.empty(10**15))):
        message = explained(error)
        assert message.startswith("out of memory: ")
        assert "--data.calibration_batch_size 1" in message
        assert "GPU 0" not in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_says_so():
    from_safetensors = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (from_safetensors, raised_by(on_a_full_disk)):
        assert explained(error).startswith("the disk takes no more")


def test_our_own_mistakes_keep_their_traceback(wanda_lightning_command, small, monkeypatch):
    monkeypatch.setattr("wanda_lightning.callbacks.plumbing.pruning_run.prune_as_asked", lambda: None)
    with pytest.raises(TypeError):
        wanda_lightning_command("prune", "-c", RECIPE, *small)


@pytest.fixture
def ctrl_c(monkeypatch):
    """A pruning in which somebody presses Ctrl-C."""

    def pressed(*_, **__):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("wanda_lightning.callbacks.plumbing.pruning_run.prune_as_asked", pressed)
    monkeypatch.setattr("wanda_lightning.cli.recipes.main", pressed)
    yield
    signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones


def test_ctrl_c_before_a_layer_is_finished_leaves_nothing(wanda_lightning_command, small, tmp_path, ctrl_c):
    done = wanda_lightning_command("prune", "-c", RECIPE, *small)
    assert done.returncode == 1  # Lightning's
    assert "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"config.yaml"}


def test_ctrl_c_outside_of_lightning(wanda_lightning_command, ctrl_c):
    done = wanda_lightning_command("recipes")
    assert done.returncode == 130
    assert done.stderr == ""


def test_a_mistyped_model_is_not_taken_for_another_one(wanda_lightning_command, small):
    assert wanda_lightning_command("prune", "-c", RECIPE, *small).returncode == 0
    done = wanda_lightning_command("prune", "no-such-model", "-c", RECIPE, *small[1:])
    assert "error: cannot load the config of 'no-such-model': there is no such folder here" in done.stderr


def test_what_a_failing_command_leaves_alone(wanda_lightning_command, small, tmp_path):
    results = tmp_path / "results"
    assert wanda_lightning_command("prune", "-c", RECIPE, *small).returncode == 0
    before = {file.name: file.read_bytes() for file in results.rglob("*") if file.is_file()}
    other = "--trainer.callbacks.sparsity=0.75"
    for more in ([other], [other, "--overwrite", "--trainer.callbacks.targets=[nothing]"]):
        failed = wanda_lightning_command("prune", "-c", RECIPE, *small, *more)
        assert failed.returncode != 0
        assert ("sparsity: 0.5 there, 0.75 now" in failed.stderr) == (len(more) == 1)
        assert "Traceback" not in failed.stderr
        assert {file.name: file.read_bytes() for file in results.rglob("*") if file.is_file()} == before
    done = wanda_lightning_command("prune", "-c", RECIPE, *small, other, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert json.loads((results / "pruning.json").read_text())["target_sparsity"] == 0.75
    assert "0.75" in (results / "config.yaml").read_text()
