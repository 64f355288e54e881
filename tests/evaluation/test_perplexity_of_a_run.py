"""Perplexity as validation: against float64, over dtypes, batch sizes, several sets and processes."""

import math
from functools import partial

import pytest
import torch
from helpers import TWO_PROCESSES
from lightning.pytorch import Trainer

from wanda_lightning.data import TextDataModule
from wanda_lightning.runs.causal_lm import CausalLM

LENGTH = 24


@pytest.fixture
def texts(tmp_path):
    """Two texts of a few windows, neither of them a whole number."""
    paths = {}
    for name, count in (("one", 40), ("two", 23)):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text(" ".join(f"{name} {number * number}" for number in range(count)))
    return paths


def data(evaluation, **settings) -> TextDataModule:
    defaults = {"num_samples": 3, "sequence_length": LENGTH, "max_evaluation_windows": 7}
    return TextDataModule(evaluation=evaluation, **defaults | settings)


def run(tmp_path, **settings) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=tmp_path, accelerator="cpu", enable_checkpointing=False, **quiet | settings)


def module(folder, **settings) -> CausalLM:
    return CausalLM(str(folder), optimizer=partial(torch.optim.SGD, lr=0.1), **settings)


def losses(language_model, path, count=7, whole=False) -> list[float]:
    """The mean loss of each window by transformers, its logits in float64; or every token's, if ``whole``."""
    tokens = torch.tensor(language_model.tokenizer(path.read_text())["input_ids"])
    windows = list(tokens.split(LENGTH))
    result = []
    for window in windows if whole else windows[:count]:
        with torch.no_grad():
            logits = language_model.model(window[None], use_cache=False).logits[0].double()
        nll = -logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]]
        result += nll.tolist() if whole else [nll.mean().item()]
    return result


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equals_float64_in_every_dtype(tiny_model_folder, tmp_path, texts, dtype, batch_size):
    language_model = module(tiny_model_folder, dtype=dtype)
    one = data(str(texts["one"]), batch_size=batch_size)
    (metrics,) = run(tmp_path).validate(language_model, one, verbose=False)
    # The reference's formula: the mean over windows of the mean loss. Logits of a batch of one differ by rounding.
    batches = [batch["input_ids"] for batch in one.val_dataloader()]
    total = 0.0
    for ids in batches:
        with torch.no_grad():
            logits = language_model.model(ids, use_cache=False).logits.double().log_softmax(-1)
        total -= logits[:, :-1].gather(2, ids[:, 1:, None]).mean((1, 2)).sum().item()
    assert metrics["val/perplexity"] == pytest.approx(math.exp(total / 7), rel=1e-5)
    if dtype == "float32":
        with torch.no_grad():
            loss = [language_model.model(ids, labels=ids).loss.item() * len(ids) for ids in batches]
        assert metrics["val/perplexity"] == pytest.approx(math.exp(sum(loss) / 7), rel=1e-5)


def test_several_sets_are_logged_by_name(tiny_model_folder, tmp_path, texts):
    language_model = module(tiny_model_folder)
    sets = data({name: str(path) for name, path in texts.items()}, evaluate_calibration=True, batch_size=2)
    found = {}
    for metrics in run(tmp_path).validate(language_model, sets, verbose=False):
        found |= metrics
    names = [f"val/{what}/{name}" for what in ("perplexity", "tokens") for name in ("calibration", "one", "two")]
    assert sorted(found) == names
    for name, path in texts.items():
        expected = losses(language_model, path)
        assert found[f"val/perplexity/{name}"] == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)
    with torch.no_grad():  # the reference's perplexity of the calibration samples
        samples = torch.cat([batch["input_ids"] for batch in sets.calibration_dataloader()])
        loss = language_model.model(samples, labels=samples).loss
    assert found["val/perplexity/calibration"] == pytest.approx(loss.exp().item(), rel=1e-5)
    only = data(str(texts["two"]))  # the same module on one set, and on several again
    (metrics,) = run(tmp_path).test(language_model, only, verbose=False)
    assert metrics["test/perplexity"] == pytest.approx(found["val/perplexity/two"])
    again = {
        name: value
        for each in run(tmp_path).validate(language_model, sets, verbose=False)
        for name, value in each.items()
    }
    assert again == pytest.approx(found)


def test_several_dataloaders_without_names(tiny_model_folder, tmp_path, texts):
    language_model = module(tiny_model_folder)
    language_model.configure_model()
    loaders = [data(str(path), tokenizer=language_model.tokenizer).val_dataloader() for path in texts.values()]
    trainer = run(tmp_path)
    for _ in range(2):
        first, second = trainer.validate(language_model, loaders, verbose=False)
        assert [*first, *second] == ["val/perplexity/0", "val/tokens/0", "val/perplexity/1", "val/tokens/1"]
        trainer.validate(language_model, data([str(texts["one"])]), verbose=False)  # of which nothing must stay


def test_the_last_window_counts_by_its_tokens(tiny_model_folder, tmp_path, texts):
    language_model = module(tiny_model_folder)
    settings = {"max_evaluation_windows": None, "keep_last_window": True, "batch_size": 4}
    (metrics,) = run(tmp_path).validate(language_model, data(str(texts["two"]), **settings), verbose=False)
    nll = losses(language_model, texts["two"], whole=True)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"max_evaluation_windows": 2}, {"limit": 2}, {"batch_size": 3, "limit": 2}])
def test_it_says_of_how_many_predictions_it_is_the_mean(tiny_model_folder, tmp_path, texts, settings):
    of_trainer = {"limit_val_batches": settings["limit"]} if "limit" in settings else {}
    of_data = {name: value for name, value in settings.items() if name != "limit"}
    one = data(str(texts["one"]), **{"max_evaluation_windows": None} | of_data)
    (metrics,) = run(tmp_path, **of_trainer).validate(module(tiny_model_folder), one, verbose=False)
    seen = list(one.val_dataloader())[: settings.get("limit")]
    assert metrics["val/tokens"] == sum(batch["input_ids"][:, 1:].numel() for batch in seen)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_processes_equal_float64_in_every_dtype(tiny_model_folder, tmp_path, texts, dtype, batch_size):
    one = data(str(texts["one"]), source=str(texts["two"]), batch_size=batch_size)
    both = run(tmp_path, **TWO_PROCESSES)
    (metrics,) = both.validate(module(tiny_model_folder, dtype=dtype), one, verbose=False)
    alone = module(tiny_model_folder, dtype=dtype)
    alone.configure_model()
    alone.model.eval()
    tokens = torch.tensor(alone.tokenizer(texts["one"].read_text())["input_ids"])
    windows, total = torch.stack(tokens.split(LENGTH)[:7]), 0.0
    for share in (windows[::2], windows[1::2]):  # as the processes take them: a batch's shape decides how it is rounded
        for ids in share.split(batch_size):
            with torch.no_grad():
                logits = alone.model(ids, use_cache=False).logits.double().log_softmax(-1)
            total -= logits[:, :-1].gather(2, ids[:, 1:, None]).mean((1, 2)).sum().item()
    assert metrics["val/perplexity"] == pytest.approx(math.exp(total / 7), rel=1e-5)


@pytest.mark.timeout(90)
def test_two_processes_count_every_window_once(tiny_model_folder, tmp_path, texts):
    """Seven windows over two processes, in validate and within fit, where DDP waits for batches to come out even."""
    language_model = module(tiny_model_folder)
    one = data(str(texts["one"]), source=str(texts["two"]))
    (alone,) = run(tmp_path).validate(language_model, one, verbose=False)
    for batch_size in (1, 4):
        sets = data(str(texts["one"]), source=str(texts["two"]), batch_size=batch_size)
        both = run(tmp_path, **TWO_PROCESSES, max_steps=1, num_sanity_val_steps=0)
        (metrics,) = both.validate(module(tiny_model_folder), sets, verbose=False)
        assert metrics["val/perplexity"] == pytest.approx(alone["val/perplexity"], rel=1e-6)
    trained = module(tiny_model_folder)
    trained.optimizer = partial(torch.optim.SGD, lr=0.0)
    both = run(tmp_path, **TWO_PROCESSES, max_steps=1, val_check_interval=1, num_sanity_val_steps=0)
    both.fit(trained, sets)
    assert both.callback_metrics["val/perplexity"].item() == pytest.approx(alone["val/perplexity"], rel=1e-6)
