import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_llama
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from wanda_lightning.data import TextDataModule
from wanda_lightning.data.datamodule import LEAST
from wanda_lightning.data.evaluation_sets import evaluation_rows, evaluation_sets
from wanda_lightning.data.sources import open_source

LENGTH = 32


class Holder(LightningModule):
    """Somebody's own module around a Hugging Face model; remembers the batches it was given."""

    def __init__(self, pretrained=None, tokenizer=None):
        super().__init__()
        self.save_hyperparameters("pretrained")
        self.llm = tiny_llama()  # at most 128 tokens
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self.seen = []

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"])


def validate(module, data):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.validate(module, data, verbose=False)
    return torch.cat(module.seen)


def stack(dataloader):
    return torch.cat([batch["input_ids"] for batch in dataloader])


def tokens_of(tokenizer, text):
    return torch.tensor(tokenizer(text)["input_ids"])


@pytest.fixture
def files(tmp_path):
    """Two texts of a few thousand tokens, with nothing in common."""
    calibration, evaluation = tmp_path / "calibration text.txt", tmp_path / "evaluation.txt"
    calibration.write_text("".join(f"{number} sheep\n" for number in range(600)))
    evaluation.write_text("".join(f"{number} goats\n" for number in range(600)))
    return calibration, evaluation


@pytest.mark.parametrize("several", [lambda file: file, lambda file: [file], lambda file: {"goats": file}])
def test_files_may_be_paths(several, files, tmp_path):
    calibration, evaluation = files
    data = TextDataModule(calibration, several(evaluation), tokenizer=tmp_path)
    named = TextDataModule(str(calibration), several(str(evaluation)), tokenizer=str(tmp_path))
    plain = json.dumps([data.source, data.evaluation, data.tokenizer, dict(data.hparams), data.evaluation_names])
    assert plain == json.dumps(
        [named.source, named.evaluation, named.tokenizer, dict(named.hparams), named.evaluation_names]
    )


@pytest.mark.parametrize("spelled", ["~/calibration text.txt", "here/../calibration text.txt", "link.txt"])
def test_a_file_under_two_spellings_is_one(spelled, files, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link.txt").symlink_to(files[0])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert evaluation_sets(spelled, str(files[0]), "text", "test")[0].source is None


def test_without_a_trainer(tokenizer):
    data = TextDataModule(
        tokenizer=tokenizer, num_samples=5, sequence_length=LENGTH, calibration_batch_size=2, batch_size=3
    )
    data.prepare_data()
    data.setup()
    batches = list(data.calibration_dataloader())
    assert [batch["input_ids"].shape for batch in batches] == [(2, LENGTH), (2, LENGTH), (1, LENGTH)]
    assert batches[0].keys() == {"input_ids"}
    assert batches[0]["input_ids"].dtype == torch.int64
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (3, LENGTH)


def test_numpys_numbers_are_those_of_python_in_a_checkpoint():
    counts = dict.fromkeys(LEAST, np.int64(2))
    assert {type(value) for name, value in TextDataModule(**counts).hparams.items() if name in counts} == {int}


def test_splits_hold_the_windows_of_their_parts(tokenizer, files):
    path, _ = files
    data = TextDataModule(str(path), tokenizer=tokenizer, num_samples=4, sequence_length=LENGTH, batch_size=2, seed=3)
    parts = {
        split: tokens_of(tokenizer, open_source(str(path)).text(split))
        for split in ("calibration", "train", "evaluation")
    }

    draw = random.Random(3)
    starts = [draw.randint(0, len(parts["calibration"]) - LENGTH - 1) for _ in range(4)]
    expected = torch.stack([parts["calibration"][start : start + LENGTH] for start in starts])
    assert torch.equal(stack(data.calibration_dataloader()), expected)

    count = len(parts["evaluation"]) // LENGTH
    expected = parts["evaluation"][: count * LENGTH].view(count, LENGTH)
    assert torch.equal(stack(data.val_dataloader()), expected)
    assert torch.equal(stack(data.test_dataloader()), expected)

    count = len(parts["train"]) // LENGTH
    ordered = parts["train"][: count * LENGTH].view(count, LENGTH)
    shuffled = stack(data.train_dataloader())
    assert not torch.equal(shuffled, ordered)
    assert sorted(shuffled.tolist()) == sorted(ordered.tolist())
    assert torch.equal(shuffled, stack(data.train_dataloader()))


def test_a_separate_evaluation_file_leaves_both_whole(tokenizer, files):
    calibration, evaluation = files
    data = TextDataModule(
        str(calibration), str(evaluation), tokenizer, num_samples=6, sequence_length=LENGTH, max_evaluation_windows=7
    )
    tokens = tokens_of(tokenizer, calibration.read_text())
    random.seed(0)
    starts = [random.randint(0, len(tokens) - LENGTH - 1) for _ in range(6)]
    expected = torch.stack([tokens[start : start + LENGTH] for start in starts])
    assert torch.equal(stack(data.calibration_dataloader()), expected)
    assert len(data.train_dataloader()) == len(tokens) // LENGTH
    tokens = tokens_of(tokenizer, evaluation.read_text())
    assert torch.equal(stack(data.val_dataloader()), tokens[: 7 * LENGTH].view(7, LENGTH))


@pytest.mark.parametrize("whole", [True, False])
def test_held_out_windows_are_of_the_source_and_seen_by_nobody_else(tokenizer, files, whole):
    """Where calibration takes all of the text they lie between its windows, else in the part for training."""
    source, other = files
    settings = {"tokenizer": tokenizer, "num_samples": 3, "sequence_length": LENGTH, "batch_size": 2}
    data = TextDataModule(str(source), str(other) if whole else None, **settings)
    held_out, calibration = stack(data.held_out_dataloader(5)), stack(data.calibration_dataloader())
    assert held_out.shape == (5, LENGTH)
    text = source.read_text() if whole else open_source(str(source)).text("train")
    held_out, calibration = ([tokenizer.decode(window) for window in each] for each in (held_out, calibration))
    assert all(text.count(piece) == 1 for piece in held_out)
    seen = [{*range(text.find(piece), text.find(piece) + len(piece))} for piece in [*held_out, *calibration * whole]]
    assert all(one.isdisjoint(other) for number, one in enumerate(seen[:5]) for other in seen[number + 1 :])
    assert whole or not any(piece in text for piece in calibration)


def test_held_out_documents_are_those_behind_calibration(tokenizer):
    documents = [f"{letter} " * 90 for letter in "abcdefg"]
    data = TextDataModule(tokenizer=tokenizer, num_samples=3, sequence_length=8)
    data._source = SimpleNamespace(text=lambda split, tokenizer: iter(documents))
    assert ["".join(set(tokenizer.decode(w).split())) for w in stack(data.calibration_dataloader())] == [*"abc"]
    assert ["".join(set(tokenizer.decode(w).split())) for w in stack(data.held_out_dataloader(2))] == [*"de"]


def test_the_same_file_under_another_name_is_divided_all_the_same(tokenizer, files, monkeypatch):
    path, _ = files
    monkeypatch.chdir(path.parent)
    data = TextDataModule(str(path), path.name, tokenizer, sequence_length=LENGTH)
    alone = TextDataModule(str(path), None, tokenizer, sequence_length=LENGTH)
    assert torch.equal(stack(data.val_dataloader()), stack(alone.val_dataloader()))


def test_seed_changes_the_choice(tokenizer):
    def windows(seed):
        data = TextDataModule(tokenizer=tokenizer, num_samples=3, sequence_length=LENGTH, seed=seed)
        return stack(data.calibration_dataloader())

    assert torch.equal(windows(0), windows(0))
    assert not torch.equal(windows(0), windows(1))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("seed", 1), ("num_samples", 5), ("sequence_length", 16), ("max_evaluation_windows", 3)],
)
def test_settings_may_change_after_windows_were_made(tokenizer, setting, value):
    def windows(data):
        return torch.cat([stack(data.calibration_dataloader()), stack(data.val_dataloader())])

    asked = {"tokenizer": tokenizer, "num_samples": 3, "sequence_length": LENGTH, "max_evaluation_windows": 2}
    data = TextDataModule(**asked)
    windows(data)
    setattr(data, setting, value)
    assert torch.equal(windows(data), windows(TextDataModule(**asked | {setting: value})))


def test_the_global_generators_are_left_alone(tokenizer):
    data = TextDataModule(tokenizer=tokenizer, num_samples=3, sequence_length=LENGTH)
    before = torch.get_rng_state(), random.getstate()
    for dataloader in (data.calibration_dataloader(), data.train_dataloader(), data.val_dataloader()):
        stack(dataloader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_text_is_read_only_when_asked_for(tokenizer, monkeypatch):
    data = TextDataModule(tokenizer=tokenizer, num_samples=2, sequence_length=LENGTH)
    asked = []
    monkeypatch.setattr(data._source, "text", lambda split, tokenizer: asked.append(split) or "x " * 1000)
    data.prepare_data()
    data.setup("fit")
    assert asked == []
    data.calibration_dataloader()
    data.calibration_dataloader()
    assert asked == ["calibration"]


def test_tokenizer_and_length_come_from_the_module(tokenizer):
    module = Holder(tokenizer=tokenizer)
    assert validate(module, TextDataModule(max_evaluation_windows=2)).shape == (2, 128)


def test_tokenizer_comes_from_the_hyperparameter_pretrained(tiny_model_folder, tokenizer):
    module = Holder(pretrained=str(tiny_model_folder))
    seen = validate(module, TextDataModule(max_evaluation_windows=2, sequence_length=LENGTH))
    expected = tokens_of(tokenizer, open_source("builtin").text("evaluation"))[: 2 * LENGTH]
    assert torch.equal(seen.flatten(), expected)


def test_tokenizer_by_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    data = TextDataModule(tokenizer=str(tmp_path), num_samples=2, sequence_length=LENGTH)
    data.prepare_data()
    data.setup()
    given = TextDataModule(tokenizer=tokenizer, num_samples=2, sequence_length=LENGTH)
    assert torch.equal(stack(data.calibration_dataloader()), stack(given.calibration_dataloader()))


def test_one_datamodule_serves_models_with_other_tokenizers(tokenizer, tiny_model_folder):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny_model_folder)
    other.add_tokens(["**"])  # what headings are underlined with
    data = TextDataModule(max_evaluation_windows=4, sequence_length=LENGTH)
    first, second = validate(Holder(tokenizer=tokenizer), data), validate(Holder(tokenizer=other), data)
    assert not torch.equal(first, second)
    assert torch.equal(validate(Holder(tokenizer=tokenizer), data), first)


def test_default_length_without_a_model(tokenizer, monkeypatch):
    assert TextDataModule(tokenizer=tokenizer).describe()["sequence_length"] == 2048
    monkeypatch.setattr(tokenizer, "model_max_length", 100)
    assert TextDataModule(tokenizer=tokenizer).describe()["sequence_length"] == 100


def test_a_length_over_the_models_limit_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"sequence_length must be at most 128.*got 129"):
        validate(Holder(tokenizer=tokenizer), TextDataModule(sequence_length=129))


def test_tokens_that_the_model_does_not_know_are_refused(tokenizer):
    module = Holder(tokenizer=tokenizer)
    module.llm = tiny_llama(layers=1, vocab_size=90)
    with pytest.raises(
        ValueError, match=r"'builtin': the tokenizer gives token \d+, and the model knows those below 90"
    ):
        validate(module, TextDataModule(sequence_length=LENGTH))
    module.other = tiny_llama(layers=1)  # which of them reads the tokens is not known
    validate(module, TextDataModule(sequence_length=LENGTH, max_evaluation_windows=2))


def test_no_tokenizer_is_an_error():
    with pytest.raises(ValueError, match=r"TextDataModule\(tokenizer="):
        TextDataModule().setup()
    with pytest.raises(ValueError, match=r"TextDataModule\(tokenizer="):
        validate(Holder(), TextDataModule())


def test_a_text_too_short_names_itself(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a few words\n" * 3)
    data = TextDataModule(str(path), tokenizer=tokenizer, sequence_length=512)
    for dataloader in (data.calibration_dataloader, data.train_dataloader, data.val_dataloader):
        with pytest.raises(ValueError, match=r"part of .*short\.txt': the text has \d+ tokens.*sequence_length=512"):
            dataloader()


@pytest.mark.parametrize(
    "bad",
    [
        {"num_samples": 0},
        {"num_samples": 1.5},
        {"num_samples": True},
        {"sequence_length": 1},
        {"sequence_length": "512"},
        {"seed": -1},
        {"seed": None},
        {"batch_size": 0},
        {"calibration_batch_size": 0},
        {"max_evaluation_windows": 0},
        {"num_workers": -1},
        {"source": "missing.txt"},
        {"evaluation": "missing.txt"},
    ],
)
def test_bad_values_are_named(bad):
    [(name, value)] = bad.items()
    with pytest.raises(ValueError, match=str(value)) as error:
        TextDataModule(**bad)
    assert name in str(error.value) or "missing.txt" in str(error.value)


def test_texts_have_to_be_named():
    with pytest.raises(ValueError, match="source must be a name, got a list; without a hub these work"):
        TextDataModule(["one text", "another"])


def test_describe(tokenizer):
    data = TextDataModule(tokenizer=tokenizer, num_samples=4, sequence_length=LENGTH, seed=2)
    assert data.describe() == {
        "source": "builtin",
        "evaluation": "builtin",
        "num_samples": 4,
        "sequence_length": LENGTH,
        "seed": 2,
    }


def test_the_command_line_takes_names_and_documents_everything():
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    config = parser.parse_args(["--data.tokenizer", "X", "--data.source", "a b.txt", "--data.sequence_length", "512"])
    assert (config.data.tokenizer, config.data.source, config.data.sequence_length) == ("X", "a b.txt", 512)
    undocumented = [action.dest for action in parser._actions if action.dest.startswith("data.") and not action.help]
    assert undocumented == []


def test_several_evaluation_sets(tokenizer, files):
    one, other = map(str, files)
    settings = {"tokenizer": tokenizer, "sequence_length": LENGTH, "max_evaluation_windows": 3}
    data = TextDataModule(
        evaluation={"sheep": one, "goats": other}, evaluate_calibration=True, num_samples=2, **settings
    )
    assert data.evaluation_names == ["sheep", "goats", "calibration"]
    sheep, goats, calibration = map(stack, data.val_dataloader())
    assert torch.equal(sheep.flatten(), tokens_of(tokenizer, files[0].read_text())[: 3 * LENGTH])
    assert torch.equal(goats.flatten(), tokens_of(tokenizer, files[1].read_text())[: 3 * LENGTH])
    assert torch.equal(calibration, stack(data.calibration_dataloader()))
    assert data.describe()["evaluation"] == f"{one}, {other}"

    named = TextDataModule(evaluation=[one, "builtin"], **settings)
    assert named.evaluation_names == ["calibration text", "builtin"]
    alone = TextDataModule(**settings)  # the source among its own evaluation sets is divided all the same
    assert torch.equal(stack(named.val_dataloader()[1]), stack(alone.val_dataloader()))
    assert torch.equal(stack(named.calibration_dataloader()), stack(alone.calibration_dataloader()))
    assert alone.evaluation_names == [""]
    assert TextDataModule(evaluation=["a/wikitext2", "c4"]).evaluation_names == ["wikitext2", "c4"]
    with pytest.raises(ValueError, match="two of the evaluation sets have one name"):
        TextDataModule(evaluation=["a/c4", "c4"])
    for other in (7, [7], {"mine": 7}):
        with pytest.raises(ValueError, match="evaluation must be a source, a list of them, or a dict of them by name"):
            TextDataModule(evaluation=other)
    with pytest.raises(ValueError, match="evaluation names no source"):
        TextDataModule(evaluation=[])
    with pytest.raises(ValueError, match="cannot be named 'calibration'"):
        TextDataModule(evaluation={"calibration": one}, evaluate_calibration=True)


def test_the_last_shorter_window(tokenizer, files):
    tokens = tokens_of(tokenizer, files[1].read_text())
    full, short = divmod(len(tokens), LENGTH)
    assert short >= 2
    settings = {"tokenizer": tokenizer, "sequence_length": LENGTH, "keep_last_window": True, "batch_size": 2}
    batches = list(TextDataModule(evaluation=str(files[1]), **settings).val_dataloader())
    ids = torch.cat([batch["input_ids"] for batch in batches])
    mask = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    assert len(ids) == full + 1
    assert torch.equal(ids[mask], tokens)
    limited = TextDataModule(evaluation=str(files[1]), max_evaluation_windows=2, **settings)
    assert stack(limited.val_dataloader()).shape == (2, LENGTH)


@pytest.mark.parametrize("windows", [1, 2, 5])
def test_processes_get_as_many_rows_and_no_window_twice(windows):
    ids = torch.arange(windows * LENGTH).view(windows, LENGTH)
    rows = evaluation_rows(ids, rest=torch.arange(7), processes=4)
    assert len(rows) % 4 == 0
    predicted = [row["input_ids"][row["attention_mask"].bool()][1:] for row in rows]
    assert torch.equal(torch.cat(predicted), torch.cat([*ids[:, 1:], torch.arange(1, 7)]))
    assert evaluation_rows(ids, processes=windows)[0].keys() == {"input_ids"}


def test_the_command_line_takes_one_several_or_named_evaluation_sets(tmp_path):
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    for text, expected in [("c4", "c4"), ("[wikitext2, c4]", ["wikitext2", "c4"]), ("{a: c4}", {"a": "c4"})]:
        assert parser.parse_args([f"--data.evaluation={text}"]).data.evaluation == expected
