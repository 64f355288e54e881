"""What the pages say runs: Python blocks on a tiny model, commands through the real parser, the quick ones for real."""

import argparse
import re
import shlex
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from helpers import tiny_llama, token_batches
from jsonargparse import ArgumentParser, capture_parser

import wanda_lightning
from wanda_lightning import __main__
from wanda_lightning.callbacks import PruningCallback
from wanda_lightning.cli.commands import COMMANDS
from wanda_lightning.cli.lightning_cli import run
from wanda_lightning.cli.recipes import FOLDER
from wanda_lightning.cli.short_options import written_out

PACKAGE = Path(wanda_lightning.__file__).parent
ROOT = PACKAGE.parent
DOCS = ROOT / "docs"
NEW_METHOD = DOCS / "adding-a-method.md"
PAGES = {
    "README": ROOT / "README.md",
    "architecture": PACKAGE / "README.md",
    "examples": ROOT / "examples/README.md",
    **{room: PACKAGE / room / "README.md" for room in ("calibration", "solvers", "engine")},
    "benchmarks": ROOT / "benchmarks/README.md",
    "recipes": FOLDER / "README.md",
    **{f"docs-{page.stem}": page for page in sorted(DOCS.glob("*.md"))},
}
SMALLER = {
    "sequence_length=512": "sequence_length=16",
    "num_samples=64": "num_samples=4",
    "max_steps=100": "max_steps=2",
    "Trainer(": "Trainer(enable_progress_bar=False, limit_val_batches=2, accelerator='cpu', ",
}
SMALL = [
    "--data.num_samples=4",
    "--data.sequence_length=16",
    "--data.max_evaluation_windows=4",
    "--trainer.enable_progress_bar=false",
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands_in(text: str) -> list[str]:
    """The indented lines that run our command, without what stands before it."""
    text = text.replace("\\\n", "")
    return [
        f"wanda-lightning {line}"
        for line in re.findall(r"^ +(?:wanda-lightning|python -m wanda_lightning) (.+)$", text, re.MULTILINE)
    ]


def every_command() -> list[str]:
    headers = [
        line.replace("# Run: ", "")
        for recipe in FOLDER.glob("*.yaml")
        for line in recipe.read_text().splitlines()
        if line.startswith("# Run: ")
    ]
    examples = [f"  {command.example}" for command in COMMANDS.values()]
    texts = [page.read_text() for page in PAGES.values()] + headers + examples + [__main__.HELP]
    return sorted({command for text in texts for command in commands_in(text)})


@pytest.fixture
def new_user(tmp_path, monkeypatch, tiny_model_folder) -> Path:
    """A folder with a text, a model and the method of the page on methods."""
    monkeypatch.chdir(tmp_path)
    Path("my_text.txt").write_text(topics["assert"] * 10)
    Path("my_methods.py").write_text(blocks(NEW_METHOD, "python")[0])
    Path("MODEL").symlink_to(tiny_model_folder)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_methods", None)


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return capture_parser(lambda: run(["prune"]))


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=f"{name}-{number}")
        for name, page in PAGES.items()
        for number, code in enumerate(blocks(page, "python"))
    ],
)
def test_python_blocks_run(code, new_user, tiny_model_folder):
    for name in ("MODEL", "path/or/hub-name", "results/wanda/model"):
        code = code.replace(f'"{name}"', f'"{tiny_model_folder}"')
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    vocabulary = 200
    names = {"batches": token_batches(vocab=vocabulary), "model": tiny_llama(vocab_size=vocabulary)}
    exec(code, names)
    reports = [names["report"]] if "report" in names else []
    callbacks = names["trainer"].callbacks if "trainer" in names else []
    reports += [callback.report for callback in callbacks if isinstance(callback, PruningCallback)]
    assert reports or not re.search(r"prune_model\(|Trainer\(.*Pruning\(", code)
    assert all(report.sparsity > 0.4 for report in reports)


class Parsed(BaseException):
    """Ends a command where it has read its arguments."""


def assert_parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command up to where its parser, whichever it is, has understood the arguments."""
    for kind in (argparse.ArgumentParser, ArgumentParser):

        def parse(self, *args, parse_args=kind.parse_args, **settings):
            raise Parsed(parse_args(self, *args, **settings))

        monkeypatch.setattr(kind, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", ["wanda-lightning", *arguments])
    with pytest.raises(SystemExit if "--help" in arguments else Parsed) as end:
        __main__.main()
    assert "--help" not in arguments or end.value.code == 0


@pytest.mark.parametrize("command", every_command())
def test_commands_are_understood(command, parser, new_user, monkeypatch):
    _, name, *arguments = shlex.split(command, comments=True)
    if name not in COMMANDS:
        assert name in ("--print_completion", "COMMAND")
    elif COMMANDS[name].function is not None:
        assert_parsed([name, *arguments], monkeypatch)
    elif "--help" not in arguments and "NAME" not in command:
        arguments = [argument for argument in arguments if argument != "--print_config"]
        if "mine.yaml" in arguments:
            Path("mine.yaml").write_text((FOLDER / "wanda.yaml").read_text())
        written = written_out([name, *arguments])
        if not any(argument.startswith("--model.pretrained") for argument in written):
            written += ["--model.pretrained", "MODEL"]
        parser.parse_args(written)


def test_the_first_page_from_the_command_line(new_user, monkeypatch, capsys):
    """Getting started, from top to bottom, with a smaller model and text."""
    page = (DOCS / "getting-started.md").read_text()
    listed = [command for command in commands_in(page) if "--print_completion" not in command]
    assert len(listed) == 9
    for command in listed:
        _, name, *arguments = shlex.split(command, comments=True)
        if COMMANDS[name].function is None:
            arguments += [*SMALL, "--trainer.accelerator=cpu"]
            if "--print_config" in arguments:  # shows what stands before it
                arguments.append(arguments.pop(arguments.index("--print_config")))
        monkeypatch.setattr(sys, "argv", ["wanda-lightning", name, *arguments])
        code = None
        try:
            __main__.main()
        except SystemExit as stop:  # of --print_config, or of a mistake
            code = stop.code
        assert not code, command
        assert capsys.readouterr().out, command
    assert {path.name for path in (new_user / "results/wanda").iterdir()} >= {"report.html", "model", "config.yaml"}


def test_a_new_method_in_under_twenty_lines(new_user):
    """The page's method removes what a loop over rows removes, and runs from a recipe and in a sweep."""
    code = blocks(NEW_METHOD, "python")[0]
    assert len(code.splitlines()) < 20
    names = {}
    exec(code, names)
    weight_OI, x_TI = torch.randn(6, 10), torch.randn(50, 10)
    statistic = wanda_lightning.InputNorm(10)
    statistic.update(x_TI)
    expected_OI = weight_OI.clone()
    for row in range(6):
        score = [weight_OI[row, i].item() ** 2 * x_TI[:, i].norm().item() for i in range(10)]
        expected_OI[row, sorted(range(10), key=score.__getitem__)[:5]] = 0
    names["SquaredWanda"]().prune(weight_OI, statistic, wanda_lightning.Unstructured(0.5))
    assert torch.equal(weight_OI, expected_OI)

    (recipe,) = blocks(NEW_METHOD, "yaml")
    Path("mine.yaml").write_text(recipe)
    model = ["--model.pretrained=MODEL", "--trainer.logger=false", *SMALL]
    assert run(["prune", "-c", "mine.yaml", *model]).trainer.pruning_callback.report.method == "SquaredWanda()"
    (sweep,) = commands_in(NEW_METHOD.read_text())
    run([*written_out(shlex.split(sweep)[1:]), *model[1:], "--sparsities=[0.5]", "--patterns=[]"])
    assert "SquaredWanda" in Path("results/sweep/comparison.md").read_text()


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["architecture", "calibration", "solvers", "engine"])
def test_files_of_the_house_exist(name):
    """Those in a row of the table are anywhere in the row's room."""
    page = PAGES[name]
    for line in page.read_text().splitlines():
        named = re.findall(r"`([\w/]+(?:/|\.py))`", line)
        room = page.parent / named[0] if line.startswith("| ") and named else page.parent
        for file in named:
            places = [page.parent / file, ROOT / file, *room.rglob(file)]
            assert any(place.exists() for place in places), file


def test_the_index_lists_every_page():
    index = (DOCS / "README.md").read_text()
    assert all(f"({page.name})" in index for page in DOCS.glob("*.md") if page.name != "README.md")
