"""What comes back is a line where it is printed or ends a cell; what it holds is in attributes, files and tables."""

import pytest
from helpers import tiny_llama

from wanda_lightning import Comparison, PruningReport, inspect_model
from wanda_lightning.evaluation.zero_shot import ZeroShotResult
from wanda_lightning.export.semi_structured import Conversion
from wanda_lightning.runs.budget import budget_of
from wanda_lightning.runs.search_result import SearchResult, Trial
from wanda_lightning.runs.speed_report import ModelSpeed, SpeedReport


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (0.5, "50 %, with val/perplexity 10.4 (+4.00%) on the held-out windows; the budget is perplexity at most 5 %"
              " over the dense model's; trials: 2"),
        (None, "nothing found yet; the budget is perplexity at most 5 % over the dense model's; trials: 2"),
    ],
)  # fmt: skip
def test_a_search(found, line):
    trials = [
        Trial(sparsity, sparsity, {"val/perplexity": perplexity}) for sparsity, perplexity in ((0.5, 10.4), (0.6, 11))
    ]
    assert repr(SearchResult(budget_of(0.05), {}, {"val/perplexity": 10.0}, trials, found)) == line


def test_a_measurement_of_speed():
    speeds = {"prompt": [2000.0, 1234.0, 900.0], "decoding": [1.5]}
    models = [ModelSpeed(name, "float32", 10, 10, 0.0, 40, 40, speeds) for name in ("dense", "pruned")]
    each = "prompt 1,234 tokens/s, decoding 1.5 tokens/s"
    assert repr(SpeedReport(models, {}, {})) == f"dense: {each}; pruned: {each}"


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(layers=2).save_pretrained(folder)
    return inspect_model(folder, num_samples=2, sequence_length=8)


def test_an_inspection(inspected):
    layers = "2 decoder layers (model.layers.0 to model.layers.1)"
    size = f"LlamaForCausalLM: {inspected.parameters:,} parameters, {layers}"
    assert repr(inspected) == f"{size}; 100.00% of their matrix weights are prunable"


def test_weights_in_a_folder(inspected):
    assert repr(inspected.weights) == "0.00% of the weights of 14 prunable matrices are zero."


def test_answers_to_tasks():
    metrics = {"boolq/acc": 0.5, "boolq/acc_stderr": 0.1, "mean/acc": 0.512345}
    assert repr(ZeroShotResult(metrics, {"samples": [*range(1000)]})) == "boolq/acc 0.5, mean/acc 0.5123"


def test_runs_side_by_side(tmp_path):
    for sparsity in (0.25, 0.5):
        PruningReport("Wanda(variant=False)", "unstructured", sparsity).save(tmp_path / str(sparsity))
    assert repr(Comparison([tmp_path])) == "runs: Wanda in 0.25; Wanda in 0.5"


def test_a_conversion():
    converted = Conversion(["q_proj", "k_proj"], {"v_proj": "not 2:4"})
    assert repr(converted) == "2 linears are computed by 2:4 sparse kernels; 1 not: not 2:4"
