"""JSON that every parser takes, where figures are not finite."""

import json
import math

import pytest
from helpers import SomebodysData, SomebodysModule, pruning_trainer

from wanda_lightning import Magnitude
from wanda_lightning.json_files import read_json, to_json, write_json
from wanda_lightning.runs.comparison import Comparison


class Diverged(SomebodysModule):
    """Its validation ends in figures that JSON has no numbers for."""

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val/perplexity": math.inf, "val/bits": math.nan, "val/change": -math.inf})


def strictly(text: str):
    """Read JSON as its standard has it, and JavaScript, jq and pandas: without NaN and Infinity."""

    def refuse(number):
        raise ValueError(f"{number} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_their_names():
    plain = {"a": [1.5, math.nan], "b": {"c": (math.inf, -math.inf)}, "d": None, "e": True, "f": "of infinity"}
    said = {"a": [1.5, "NaN"], "b": {"c": ["Infinity", "-Infinity"]}, "d": None, "e": True, "f": "of infinity"}
    assert strictly(to_json(plain)) == said


@pytest.mark.parametrize("number", [0.1, 5e-324, 1e308, -0.0, math.inf, -math.inf, math.nan])
def test_numbers_are_read_as_they_were(tmp_path, number):
    write_json(tmp_path / "file.json", {"of": [{"a": number}]})
    assert read_json(tmp_path / "file.json")["of"][0]["a"].hex() == number.hex()


def test_a_file_of_an_older_version_is_read(tmp_path):
    (tmp_path / "file.json").write_text('{"a": Infinity, "b": [NaN]}')
    assert str(read_json(tmp_path / "file.json")) == "{'a': inf, 'b': [nan]}"


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """The folder of a sweep over a model that diverged, and the table that it ended with."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, pruning_trainer(folder).sweep(Diverged(), SomebodysData(), [Magnitude()], [0.5])


@pytest.mark.parametrize("file", ["sweep.json", "comparison.json", "magnitude-0.5/pruning.json"])
def test_the_files_of_a_run_that_diverged_are_json(diverged, file):
    assert "val/perplexity" in str(strictly((diverged[0] / file).read_text()))


def test_what_is_read_of_a_run_that_diverged_is_what_it_gave(diverged):
    folder, comparison = diverged
    assert Comparison([folder / "magnitude-0.5"]).table() == comparison.table()


def test_a_sweep_over_a_model_that_diverged_goes_on(diverged):
    more = pruning_trainer(diverged[0]).sweep(Diverged(), SomebodysData(), [Magnitude()], [0.75])
    assert [row["sparsity"] for row in more.rows()] == [0.0, 0.75, 0.5]
