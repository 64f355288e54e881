"""Every packaged recipe runs on a tiny model, from its own header's command."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import wanda_lightning
from wanda_lightning.cli.lightning_cli import run

FOLDER = Path(wanda_lightning.__file__).parent / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def launch_line(recipe: str) -> str:
    return re.search(r"^# Run: +wanda-lightning (.*)$", (FOLDER / recipe).read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in ("search.yaml", "sweep.yaml")])
def test_recipe_runs(recipe, tiny_model_folder, tmp_path):
    command, dash_c, path, *_ = launch_line(recipe).split()
    assert (dash_c, path) == ("-c", f"recipes/{recipe}")
    settings = yaml.safe_load((FOLDER / recipe).read_text())
    callback = settings["trainer"]["callbacks"][0]["init_args"]
    schedule = callback.get("schedule")  # of a gradual pruning; Ablate's setting of that name is a word
    gradual_end = schedule["init_args"]["end"] if isinstance(schedule, dict) else 0
    lora = settings["model"].get("init_args", {}).get("lora", {})
    small = {
        "model.pretrained": tiny_model_folder,
        "data.num_samples": 4,
        "data.sequence_length": 16,
        "data.max_evaluation_windows": 4,
        "trainer.default_root_dir": tmp_path,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        **({"trainer.max_steps": gradual_end + 3} if command == "fit" else {}),
    }
    run([command, "-c", str(FOLDER / recipe), *(f"--{key}={value}" for key, value in small.items())])

    report = json.loads((tmp_path / "pruning.json").read_text())
    assert report["sparsity"] == 0.5
    stages = ["dense", *([] if gradual_end else ["pruned"]), *(["fine-tuned"] if command == "fit" else [])]
    stages += ["merged"] if lora.get("merge") == "masked" else []
    assert list(report["evaluations"]) == stages
    assert all(stage["val/perplexity"] > 1 for stage in report["evaluations"].values())
    assert report["calibration"]["sequence_length"] == 16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for row in report["linears"]:
        weight = model.get_parameter(f"{row['name']}.weight")
        assert (weight == 0).float().mean().item() == 0.5
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed_everything"] == settings["seed_everything"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_header(recipe):
    what, needs, launch, result, *_ = (FOLDER / recipe).read_text().splitlines()
    assert what.startswith("# ")
    assert needs.startswith("# Needs: ")
    assert launch.startswith("# Run: ")
    assert result.startswith(f"# Result: results/{recipe.removesuffix('.yaml')}/")


def test_the_table_lists_every_recipe():
    table = (FOLDER / "README.md").read_text()
    assert re.findall(r"^\| `(\S+\.yaml)` \| `(\S+)` \|", table, re.MULTILINE) == [
        (recipe, launch_line(recipe).split()[0]) for recipe in RECIPES
    ]


def test_the_same_seed_gives_the_same_bytes(tiny_model_folder, tmp_path):
    for folder in ("one", "two"):
        torch.manual_seed(len(folder) * 7 + (folder == "two"))  # the recipe's seed decides, not what ran before
        run([
            "prune", "-c", str(FOLDER / "wanda.yaml"), f"--model.pretrained={tiny_model_folder}",
            "--data.num_samples=4",
            "--data.sequence_length=16", "--data.max_evaluation_windows=2", "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path / folder}",
        ])  # fmt: skip
    one, two = ((tmp_path / folder / "model/model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two
