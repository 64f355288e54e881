"""What is answered before torch is imported: mistakes must not take seconds to be seen."""

import json
import subprocess
import sys

import pytest

from wanda_lightning.cli.first_look import NO_MODEL, PLAIN, refuse_at_once
from wanda_lightning.cli.short_options import written_out

RUN = """
import json, sys
from wanda_lightning.__main__ import main
sys.argv = ["wanda-lightning", *json.loads(sys.argv[1])]
try:
    main()
finally:
    print(*{name.partition(".")[0] for name in sys.modules})
"""


def answer(arguments, folder) -> tuple[int, str, set[str]]:
    """The exit code of a fresh interpreter, all that it said, and the modules that it had loaded."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(arguments)], capture_output=True, text=True, cwd=folder
    )
    said, _, modules = done.stdout.strip().rpartition("\n")
    return done.returncode, said + done.stderr, set(modules.split())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["prun"], 2, "there is no command 'prun'"),
        (["prune"], 2, NO_MODEL),
        (["fit", "-c", "wanda_finetune", "--trainer.max_steps", "3"], 2, NO_MODEL),
        (["prune", "-c", "wonda"], 2, "there is no file 'wonda', and the recipes of the package are ablate"),
        (["prune", "--config=no/such.yaml"], 2, "there is no file 'no/such.yaml'"),
        (["fit", "MODEL", "-c", "sweep"], 2, "sweep is a recipe for `wanda-lightning sweep`, not for fit"),
        (["prune", "MODEL", "-c", "search"], 2, "search is a recipe for `wanda-lightning search`, not for prune"),
        (["prune", "-c"], 2, "see `wanda-lightning recipes`"),
        (["recipes"], 0, "wanda_finetune"),
        (["recipes", "show", "wonda"], 2, "there is no file 'wonda'"),
        (["prune", "--help"], 0, "\n\nThe options that matter most:\n  MODEL "),
        (["fit", "MODEL", "-c", "wanda", "-h"], 0, "--max_steps N"),
        (["sweep", "--help"], 0, "--sparsities LIST"),
        (["validate", "--help"], 0, "--help-all"),
        (["generate", "--help"], 0, "[PROMPT ...]"),
        (["prune", "MODEL", "--sparsty", "0.6"], 2, "there is no option --sparsty\n  did you mean --sparsity?"),
        (["fit", "MODEL", "--ouput=x"], 2, "did you mean --output?"),
        (["prune", "./nothing"], 2, "there is no folder './nothing'"),
        (["validate", "nothing.gguf"], 2, "no such GGUF file: nothing.gguf"),
        (["fit", "."], 2, ". is no model folder: it holds no config.json"),
        (["generate"], 2, "are required: pretrained"),
        (["generate", "MODEL", "--max_tokens", "5"], 2, "--max_tokens 5\n  did you mean --tokens?"),
        (["compare", "RUN", "--plt=a.png"], 2, "did you mean --plot?"),
        (["compare"], 2, "are required: runs"),
        (["compare", "--help"], 0, "RUN [RUN ...]"),
        (["compare", "--help"], 0, "type: Path)"),
        (["compress", "model"], 2, "are required: output"),
        (["decompress", "--help"], 0, "decompress to-ship model"),
        (["inspect"], 2, "are required: pretrained"),
        (["inspect", "MODEL", "--nothing"], 2, "--nothing"),
        (["inspect", "MODEL", "--dtype=float99"], 2, "bfloat16"),
        (["inspect", "--help"], 0, "--num_samples"),
        (["prune", "MODEL", "--sparsity", "50"], 2, "in [0, 1), got '50'; write 0.5 to prune 50 %"),
        (["prune", "MODEL", "--dtype=bf16"], 2, "--dtype must be one of auto, float32, bfloat16, float16, float64"),
        (["speed", "MODEL", "--batch_sizes", "1"], 2, "--batch_sizes must be a list such as '[1, 8]'; got 1"),
        (["sweep", "MODEL", "--overwrite"], 2, "sweep has no --overwrite"),
        (["recipes", "wanda"], 2, "action must be one of list, show, copy, got 'wanda'"),
    ],
)
def test_answers_without_torch(arguments, code, said, tmp_path):
    exit_code, everything, modules = answer(arguments, tmp_path)
    assert exit_code == code
    assert said in everything
    assert "Traceback" not in everything
    assert modules.isdisjoint({"torch", "lightning", "transformers"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--model.pretrained", "MODEL"],
        ["prune", "-c", "wanda", "--model=mine.yaml"],
        ["prune", "-c", "{model: {class_path: CausalLM}}"],
        ["prune", "-cmine.yaml"],
        ["prune", "-c", "mine.yaml", "--model.pretrained=mine.yaml"],
        ["prune", "--model=my.Model", "--model.pretrained=mine.yaml"],
        ["prune", "-c", "{model: {class_path: my.Model}}", "--model.pretrained=mine.yaml"],
        ["prune", "MODEL"],
        ["prune", "MODEL", "--batch_size", "3"],
        ["prune", "MODEL", "--trainer.max_stepz", "3"],
        ["sweep", "MODEL", "--sparsities=[0.5]", "--seed_everything", "true"],
        ["prune", "MODEL", "-c", "wanda"],
        ["prune", "--help"],
        ["prune", "-h"],
        ["fit", "--trainer.callbacks.help", "WandaPruning"],
        ["fit", "--data.help=TextDataModule"],
        ["prune", "-c", "wanda", "--print_config"],
    ],
)
def test_what_may_be_right_is_left_to_the_parser(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model:\n  class_path: my.Model\n")
    refuse_at_once(written_out(arguments))


def test_the_options_without_a_dot_are_those_of_the_parser():
    from jsonargparse import capture_parser

    from wanda_lightning.cli.lightning_cli import run

    parser = capture_parser(lambda: run(["prune"]))
    for command in parser._subcommands_action._name_parser_map.values():
        options = {option for option in command._option_string_actions if "." not in option and "+" not in option}
        assert options <= {*PLAIN, "--model", "--data"}


def test_comments_name_no_model(tmp_path):
    (tmp_path / "mine.yaml").write_text("# Run: --model.pretrained MODEL\nseed_everything: 1  # of the model\n")
    with pytest.raises(ValueError, match="no model was given"):
        refuse_at_once(["prune", "-c", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model:\n\tpretrained: MODEL\n", "mine.yaml is no YAML: while scanning"),
        (b"model: [", "mine.yaml is no YAML: while parsing"),
        (b"\xff\xfe", "mine.yaml is no YAML: 'utf-8' codec"),
        (b"- model\n- data\n", "mine.yaml is no recipe: .*got .'model', 'data'"),
        (b"model", "mine.yaml is no recipe: .*got model"),
        (b"", "mine.yaml is no recipe: .*got None"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        refuse_at_once(["prune", "-c", str(tmp_path / "mine.yaml"), "--model.pretrained=MODEL"])


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        refuse_at_once(["prune", "-c", str(tmp_path), "--model.pretrained=MODEL"])
