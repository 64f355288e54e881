"""``prune MODEL --method wanda --sparsity 0.6``, and what it is written out to."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from wanda_lightning import callbacks
from wanda_lightning.cli.first_look import refuse_at_once
from wanda_lightning.cli.help import description
from wanda_lightning.cli.recipes import recipes, settings_of
from wanda_lightning.cli.short_options import LONG, METHODS, OF_CALLBACK, RECIPES, closest, written_out
from wanda_lightning.methods.named import METHODS as METHODS_IN_PYTHON


def test_the_names_of_methods_are_those_of_python():
    classes = {name: getattr(callbacks, callback)().method for name, callback in METHODS.items()}
    assert {name: type(method) for name, method in classes.items()} == METHODS_IN_PYTHON


@pytest.mark.parametrize("command", ["prune", "sweep", "search"])
def test_what_help_says_of_the_options_is_one_column(command):
    options = [line for line in description(command).splitlines() if line.startswith(("  -", "  MODEL"))][:-1]
    assert len({re.match(r"  \S.*?  +", line).end() for line in options}) == 1


def test_help_names_every_budget_of_a_search():
    assert {"--max_perplexity_increase", "--max_bytes", "--max_drop", "--max_rise"} <= {
        *re.findall(r"--\w+", description("search"))
    }


def test_help_names_every_short_option():
    for option in {*LONG, *OF_CALLBACK} - {"--model"}:
        assert f"\n  {option} " in description("fit")
    assert all(name in description("prune") for name in METHODS)
    for name in ("validate", "test", "sweep"):
        assert not any(f"\n  {option} " in description(name) for option in (*OF_CALLBACK, "--max_steps"))
    assert set(RECIPES.values()) <= set(recipes())


def test_defaults_in_help_are_those_of_the_recipes():
    recipe = settings_of(RECIPES["fit"])
    length = recipe["data"]["init_args"]["sequence_length"]
    assert f" training steps, by default {recipe['trainer']['max_steps']}\n" in description("fit")
    assert f" tokens in a window, by default {length}\n" in description("fit")
    for command, name in RECIPES.items():
        folder = settings_of(name)["trainer"]["default_root_dir"].replace("wanda", "METHOD")
        assert re.search(rf"  --output DIR .* by default {folder}(,|$)", description(command), re.MULTILINE), command


@pytest.mark.parametrize(
    ("commands", "option"),
    [
        (("prune", "sweep", "search", "validate", "test"), "to calibrate and train with"),
        (("validate", "test"), "to calibrate"),
        (("validate", "test", "sweep"), "-v"),
        (("validate", "test", "sweep"), "--overwrite"),
    ],
)
def test_help_says_nothing_of_what_has_no_effect(commands, option):
    assert [command for command in commands if f" {option}" in description(command)] == []


def given_by(arguments: list[str]) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in arguments if "=" in argument)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("prune M", "prune --config=wanda --model.pretrained=M --trainer.default_root_dir=results/wanda"),
        ("fit M", "fit --config=wanda_finetune --model.pretrained=M --trainer.default_root_dir=results/wanda_finetune"),
        ("prune M --output D", "prune --config=wanda --model.pretrained=M --trainer.default_root_dir=D"),
        ("prune --output=D M", "prune --config=wanda --trainer.default_root_dir=D --model.pretrained=M"),
        ("prune M -c sparsegpt", "prune --config=sparsegpt --model.pretrained=M"),
        ("prune -csparsegpt M", "prune --config=sparsegpt --model.pretrained=M"),
        ("prune --config=a.yaml --overwrite M", "prune --config=a.yaml --model.pretrained=M --overwrite"),
        ("prune --trainer.devices 1 M -c a.yaml", "prune --config=a.yaml --model.pretrained=M --trainer.devices 1"),
        ("validate M --eval wikitext2", "validate --model.pretrained=M --data.evaluation=wikitext2"),
        ("sweep M", "sweep --config=sweep --model.pretrained=M"),
        ("search M --max_bytes 9", "search --config=search --model.pretrained=M --max_bytes 9"),
        ("sweep M --data my.Notes", "sweep --config=sweep --model.pretrained=M --data my.Notes"),
        ("validate M --data my.txt", "validate --model.pretrained=M --data.source=my.txt"),
        ("validate M --data a/Corpus", "validate --model.pretrained=M --data.source=a/Corpus"),
    ],
)
def test_short_becomes_long(short, long, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("trainer:\n  callbacks: WandaPruning\n")
    assert written_out(short.split()) == long.split()
    assert written_out(long.split()) == long.split()
    refuse_at_once(long.split())


@pytest.mark.parametrize(
    "line",
    ["prune", "prune --help", "prune -c wanda --model.pretrained M", "fit --model CausalLM --data TextDataModule",
     "prune --model {class_path:X} --data=mine.yaml", "prune -c", "prune --trainer.max_steps 3"],
)  # fmt: skip
def test_a_line_without_short_options_stays_as_it_is(line):
    assert written_out(line.split()) == line.split()


def test_a_file_that_is_called_like_a_class_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.Mine").write_text("text")
    assert "--data.source=notes.Mine" in written_out(["prune", "M", "--data", "notes.Mine"])


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("--method sparsegpt", {"class_path": "SparseGPTPruning", "init_args": {"sparsity": 0.5}}),
        ("--sparsity 0.6", {"class_path": "WandaPruning", "init_args": {"sparsity": 0.6, "pattern": "unstructured"}}),
        ("--pattern 2:4", {"class_path": "WandaPruning", "init_args": {"sparsity": None, "pattern": "2:4"}}),
        ("--method=RIA --pattern=1:4", {"class_path": "RIAPruning", "init_args": {"sparsity": None, "pattern": "1:4"}}),
        (
            "-c wanda_2of4 --sparsity 0.6",
            {"class_path": "WandaPruning", "init_args": {"sparsity": 0.6, "pattern": "unstructured"}},
        ),
        (
            "--prompt=a --sparsity 0.6 --prompt b",
            {
                "class_path": "WandaPruning",
                "init_args": {"sparsity": 0.6, "pattern": "unstructured", "prompts": ["a", "b"]},
            },
        ),
        ("-c wanda_2of4 --method admm", {"class_path": "ADMMPruning", "init_args": {"pattern": "2:4"}}),
    ],
)
def test_what_the_pruning_callback_is_asked_for(options, settings):
    (callback,) = json.loads(given_by(written_out(["prune", "M", *options.split()]))["--trainer.callbacks"])
    assert callback == settings


def test_other_callbacks_and_settings_stay(tmp_path):
    recipe = tmp_path / "mine.yaml"
    own = [
        "StochasticWeightAveraging",
        {"class_path": "wanda_lightning.WandaPruning", "init_args": {"ignore": ["down_proj"], "output_dir": "a"}},
        {"class_path": "ZeroShotEvaluation", "init_args": {"tasks": ["x"]}},
    ]
    recipe.write_text(yaml.safe_dump({"trainer": {"callbacks": own}}))
    written = written_out(["prune", "M", "-c", str(recipe), "--sparsity=0.7", "--output", "b"])
    first, pruning, last = json.loads(given_by(written)["--trainer.callbacks"])
    assert (first, last) == ({"class_path": own[0], "init_args": {}}, own[2])
    assert pruning["init_args"] == {
        "ignore": ["down_proj"],
        "output_dir": "b",
        "sparsity": 0.7,
        "pattern": "unstructured",
    }


def test_a_recipe_without_pruning_gets_a_callback(tmp_path):
    written = written_out(["prune", "M", "-c", "{trainer: {callbacks: [RichProgressBar]}}", "--pattern", "2:4"])
    assert json.loads(given_by(written)["--trainer.callbacks"]) == [
        {"class_path": "RichProgressBar", "init_args": {}},
        {"class_path": "WandaPruning", "init_args": {"sparsity": None, "pattern": "2:4"}},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prune M --method wonda", "one of magnitude, wanda, .*, got 'wonda'; did you mean wanda"),
        ("prune M --method", "--method needs a value"),
        ("prune M N", "one model at a time, got 'M' and 'N'"),
        ("prune M --sparsity half", r"--sparsity must be a number in \[0, 1\), got 'half'$"),
        ("prune M --sparsity nan", r"--sparsity must be a number in \[0, 1\), got 'nan'$"),
        ("prune M --sparsity inf", r"--sparsity must be a number in \[0, 1\), got 'inf'$"),
        ("prune M --sparsity 2:4", "an N:M pattern is --pattern"),
        ("validate M --sparsity 0.5", "validate has no --sparsity"),
        ("sweep M --method wanda", "sweep has no --method: it takes --methods"),
        ("validate M --prompt x", "validate has no --prompt$"),
        ("search M --sparsity 0.5", "search has no --sparsity: it finds the sparsity"),
        ('prune M -c {"trainer":{"callbacks":[3]}} --sparsity 0.5', "a callback needs a class_path, got 3"),
        ("prune M -c no_such --sparsity 0.5", "there is no file 'no_such'"),
    ],
)
def test_mistakes(line, message):
    with pytest.raises(ValueError, match=message):
        written_out(line.split())


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("--sparsty", "--sparsity"),
        ("--metod", "--method"),
        ("--out", None),
        ("--ouput", "--output"),
        ("--trainer.max_stepz", "--trainer.max_steps"),
        ("--data.num_sample", "--data.num_samples"),
        ("--batch_size", "--data.batch_size"),
        ("--something", None),
    ],
)
def test_the_option_that_was_meant(mistyped, meant):
    known = [*LONG, *OF_CALLBACK, "--trainer.max_steps", "--data.num_samples", "--data.batch_size"]
    assert closest(mistyped, known) == meant


def test_a_mistake_is_said_before_torch_is_imported(tmp_path):
    code = (
        "import sys; sys.argv = ['wanda-lightning', 'prune', 'M', '--method', 'x']\n"
        "from wanda_lightning.__main__ import main\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert "--method must be one of" in done.stderr


def test_zeros_are_asked_of_callbacks_that_make_zeros():
    found = given_by(written_out(["fit", "M", "-c", "shrink", "--pattern", "2:4"]))
    callbacks = json.loads(found["--trainer.callbacks"])
    assert [each["class_path"] for each in callbacks] == ["WidthPruning", "DepthPruning", "WandaPruning"]
    assert callbacks[0]["init_args"] == {"keep": 0.8}
    assert callbacks[2]["init_args"] == {"sparsity": None, "pattern": "2:4"}
