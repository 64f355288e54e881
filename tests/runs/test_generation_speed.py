"""How fast models generate: counted right, in turns, and nothing said that the figures do not show."""

import json
import sys
from dataclasses import replace
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_llama

from wanda_lightning import __main__, measure_speed
from wanda_lightning.runs import generation_speed
from wanda_lightning.runs.speed_report import Gain, ModelSpeed, SpeedReport, Spread
from wanda_lightning.runs.tensor_memory import peak_on_top, weight_bytes

SMALL = {"prompt": 20, "new_tokens": 4, "batch_sizes": (1, 3), "rounds": 2}
QUANTITIES = ["decoding (batch 1)", "decoding (batch 3)", "prompt (20 tokens)"]


@pytest.fixture
def folders(tmp_path):
    """A model; the same with half of its weights zero, and another with half of the neurons."""
    names = [str(tmp_path / name) for name in ("dense", "zeros", "narrow")]
    for name, width in zip(names, (64, 64, 32), strict=True):
        model = tiny_llama(intermediate_size=width)
        if name.endswith("zeros"):
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.data[:, ::2] = 0
        model.save_pretrained(name)
    return names


@pytest.fixture
def calls(monkeypatch):
    """Time that passes only when a model is called: a second, and a hundredth for every number in its input."""
    calls, clock = [], [0.0]
    load = generation_speed.load_model

    class Clock:
        @staticmethod
        def perf_counter():
            return clock[0]

    def timed(pretrained, dtype, **trusted):
        model = load(pretrained, dtype, **trusted)

        def tick(_, args, kwargs):
            calls.append((pretrained, tuple(kwargs["input_ids"].shape)))
            clock[0] += (1 + kwargs["input_ids"].numel() / 100) * (0.5 if "narrow" in pretrained else 1)

        model.register_forward_pre_hook(tick, with_kwargs=True)
        return model

    monkeypatch.setattr(generation_speed, "time", Clock)
    monkeypatch.setattr(generation_speed, "load_model", timed)
    return calls


def test_tokens_a_second_are_those_of_the_clock(folders, calls):
    report = measure_speed(folders, **SMALL)
    for model, speed in zip(report.models, (1, 1, 2), strict=True):
        assert [*model.tokens_per_second] == QUANTITIES
        expected = [1 / 1.01, 3 / 1.03, 20 / 1.2]
        for measured, rate in zip(model.tokens_per_second.values(), expected, strict=True):
            assert measured == pytest.approx([speed * rate] * 2)
    assert [gain.ratios for gain in report.gains(report.models[2]).values()] == [pytest.approx([2, 2])] * 3


def test_the_models_take_turns(folders, calls):
    measure_speed(folders, **SMALL)
    prompts = [(model, shape) for model, shape in calls if shape[1] > 1]
    shapes = [(1, 16), (3, 16), (1, 20)]
    warm = [*product(folders, shapes)]
    there = [(model, shape) for shape in shapes for model in folders]
    back = [(model, shape) for shape in shapes for model in reversed(folders)]
    assert prompts == warm + there + back
    assert len([shape for _, shape in calls if shape == (3, 1)]) == 4 * 3 * 3  # tokens, models, rounds with the first


def test_weights_are_copied_out_of_their_files(folders, monkeypatch):
    """Mapped files are laid out in memory differently from one another: copies of a model differed by a twentieth."""
    model = tiny_llama(tie_word_embeddings=True)
    before = [weight.data for weight in model.parameters()]
    monkeypatch.setattr(generation_speed, "load_model", lambda *_, **__: model)
    measure_speed(folders[:1], **SMALL)
    assert {weight.data_ptr() for weight in before}.isdisjoint(weight.data_ptr() for weight in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_the_models_are(folders):
    report = measure_speed(folders, **SMALL | {"rounds": 1}, device="cpu")
    models = [tiny_llama(intermediate_size=width) for width in (64, 64, 32)]
    for measured, model in zip(report.models, models, strict=True):
        assert measured.parameters == model.num_parameters()
        assert measured.multiplied == model.num_parameters() - 300 * 32
        assert measured.memory > weight_bytes(model) == 4 * model.num_parameters() + 2 * 4 * 4  # and rotary frequencies
        assert 0 <= measured.file - 4 * model.num_parameters() < 8000  # the header
    assert [round(m.zeros * m.parameters) for m in report.models] == [0, 3 * 64 * 16, 0]
    findings = "\n".join(report.findings())
    share = report.models[2].multiplied / report.models[0].multiplied
    assert f"narrow: a token is multiplied by {share:.2f} of the weights, which promises {1 / share:.2f} x" in findings
    assert "zeros: decoding (batch 1), decoding (batch 3), prompt (20 tokens): too few rounds to tell" in findings
    assert f"zeros: {3 * 64 * 16 / models[1].num_parameters():.1%} of its weights are zero" in findings


def test_the_folder_of_a_run(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    (measured,) = measure_speed([tmp_path], **SMALL).models
    assert measured.file == (tmp_path / "model/model.safetensors").stat().st_size


def test_a_tied_embedding_is_multiplied(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    (measured,) = measure_speed([tmp_path], **SMALL).models
    assert measured.multiplied == measured.parameters == model.num_parameters()


def test_a_context_without_end(folders):
    config = Path(folders[0], "config.json")
    config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": -1'))
    assert measure_speed(folders[:1], **SMALL | {"prompt": 200}).settings["prompt"] == 200


def test_memory_is_that_of_the_tensors_that_live_at_once():
    given = torch.zeros(50)

    def run():
        one = given.view(5, 10) + 1  # 200 bytes
        two = torch.zeros(100)  # 600
        part = two[:3]
        del two, one  # 400: a part holds the whole
        three = torch.zeros(60) + part.sum()  # 644, with the sum and a term; then 640
        del part
        return three.add_(1)

    assert peak_on_top(run, torch.device("cpu")) == 400 + 4 + 240 + 240


def test_a_model_that_draws_or_stops_early_decodes_all_the_same(tmp_path, calls):
    model = tiny_llama()
    model.generation_config.update(do_sample=True, temperature=0.7, eos_token_id=[*range(300)])
    model.save_pretrained(tmp_path / "model")
    (measured,) = measure_speed([tmp_path / "model"], **SMALL).models
    assert measured.tokens_per_second["decoding (batch 1)"] == pytest.approx([1 / 1.01] * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": 0}, "prompt must be a whole number of at least 1, got 0"),
        ({"new_tokens": 1.5}, "new_tokens must be a whole number"),
        ({"rounds": 0}, "rounds must be"),
        ({"batch_sizes": []}, r"batch_sizes must be one or more whole numbers .* got \[\]"),
        ({"batch_sizes": [4, 0]}, "batch_sizes must be"),
        ({"batch_sizes": 4}, "batch_sizes must be a list, got 4"),
        ({"prompt": 129}, "dense has positions for 128 tokens, and prompt or new_tokens ask for 129"),
        ({"new_tokens": 113}, "ask for 129"),
        ({"device": "nothing"}, "device 'nothing' cannot be used here"),
        ({"dtype": "Linear"}, "dtype must be"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(folders, monkeypatch, settings, message):
    monkeypatch.setattr(generation_speed, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        measure_speed(folders[:1], **SMALL | settings)


def test_a_model_that_is_missing_is_seen_before_another_is_loaded(folders, monkeypatch):
    monkeypatch.setattr(generation_speed, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="there is no folder"):
        measure_speed([folders[0], "./nothing"], **SMALL)
    with pytest.raises(ValueError, match="name one or more models"):
        measure_speed([], **SMALL)
    with pytest.raises(ValueError, match="models must be a list, got 'results/model'"):
        measure_speed("results/model", **SMALL)


def test_numbers_may_be_numpys(folders, calls):
    swept = measure_speed(folders[:1], np.int64(8), np.int64(2), np.array([1, 2]), np.int64(1))
    plain = measure_speed(folders[:1], 8, 2, [1, 2], 1)
    assert json.dumps(swept.to_dict()["settings"]) == json.dumps(plain.to_dict()["settings"])


@pytest.mark.parametrize("rounds", [1, 5, 6, 9, 20])
def test_a_verdict_is_a_sign_test(rounds):
    """Against the share of all ways in which a fair coin may fall that are as one-sided or more."""
    for ahead in range(rounds + 1):
        by_chance = sum(comb(rounds, heads) for heads in range(rounds + 1)
                        if abs(heads - rounds / 2) >= abs(ahead - rounds / 2)) / 2**rounds  # fmt: skip
        verdict = Gain([1.3] * ahead + [0.7] * (rounds - ahead)).verdict
        if rounds < 6:
            assert verdict == "too few rounds to tell"
        elif by_chance > 0.05:
            assert verdict == "no faster"
        else:
            assert verdict == ("faster" if ahead > rounds / 2 else "slower")


def test_what_rounds_to_one_is_no_faster():
    assert Gain([1.004] * 10).verdict == "no faster"
    assert str(Gain([1.25, 1.5, 1.1, 1.75, 2.0, 1.5, 1.5])) == "1.50 (1.38 to 1.62) x, faster"


def test_a_round_without_a_difference_speaks_for_neither():
    """Six rounds of ten for it are a matter of chance, 75 %; ten of ten would not be."""
    assert Gain([1.0] * 4 + [1.2] * 6).verdict == "no faster"


def report_of(*ratios: float, zeros: float = 0.0, multiplied: int = 80) -> SpeedReport:
    """A model and another that is so many times as fast, round by round."""
    dense = ModelSpeed("dense", "float32", 100, 80, 0.0, 400, 500, {"decoding": [10.0] * len(ratios)})
    other = {"decoding": [10.0 * ratio for ratio in ratios]}
    pruned = ModelSpeed("pruned", "float32", multiplied + 20, multiplied, zeros, 400, 500, other)
    settings = {"prompt": 20, "new_tokens": 4, "context": 16, "rounds": len(ratios)}
    return SpeedReport([dense, pruned], settings, {"device": "cpu", "threads": 1, "environment": {"device": "a CPU"}})


def test_zeros_are_said_to_save_nothing_only_where_they_do_not():
    level = report_of(0.99, 1.01, 0.98, 0.99, 1.02, 1.0, 0.97, zeros=0.5).findings()
    assert level[0] == "pruned: decoding: no faster"
    assert "50.0% of its weights are zero" in level[1]
    assert "zeros in ordinary dense kernels save nothing" in level[1]
    faster = report_of(*[1.2] * 7, zeros=0.5).findings()
    assert faster == ["pruned: decoding: faster"]
    half = report_of(*[1.2] * 7)
    half.models[1] = replace(half.models[1], dtype="bfloat16")
    assert half.findings()[1].startswith("The models differ in dtype")
    narrow = report_of(*[1.2] * 7, multiplied=60).findings()
    assert narrow[1] == "pruned: a token is multiplied by 0.75 of the weights, which promises 1.33 x"


def test_files_hold_what_was_measured(tmp_path):
    report = report_of(*[1.2] * 7, 1.3)
    report.save(tmp_path)
    plain = json.loads((tmp_path / "speed.json").read_text())
    assert plain["models"][1]["tokens_per_second"] == {"decoding": [12.0] * 7 + [13.0]}
    assert plain["models"][1]["gains"]["decoding"] == {
        "low": 1.2, "median": 1.2, "high": pytest.approx(1.2), "verdict": "faster"
    }  # fmt: skip
    assert "| decoding: as fast | 1 | 1.20 (1.20 to 1.20) x, faster |" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"speed.json", "speed.md", "speed.png"}


def test_quartiles_of_one_measurement_are_itself():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["wanda-lightning", "speed", *map(str, arguments)])
    try:
        __main__.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_command(folders, tmp_path, monkeypatch, capsys):
    small = ["--prompt", "20", "--new_tokens", "4", "--batch_sizes", "[1, 3]", "--rounds", "2"]
    assert run(monkeypatch, *folders[:2], *small, "--output", tmp_path / "out") == 0
    assert "too few rounds to tell" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/speed.json").read_text())["settings"] == {
        "prompt": 20, "new_tokens": 4, "context": 16, "rounds": 2
    }  # fmt: skip


def test_mistakes_of_the_command_exit_with_2(folders, tmp_path, monkeypatch, capsys):
    for arguments, message in (
        (["./nothing"], "there is no folder './nothing'"),
        ([folders[0], "--rounds", "0"], "rounds must be a whole number of at least 1, got 0"),
        ([folders[0], "--prompt", "20", "--device", "nothing"], "device 'nothing' cannot be used here"),
    ):
        assert run(monkeypatch, *arguments) == 2
        assert f"error: {message}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(monkeypatch, folders[0], "--output", tmp_path / "out") == 2
    assert "wanda-lightning[plot]" in capsys.readouterr().err
