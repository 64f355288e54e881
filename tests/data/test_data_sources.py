import gzip
import json

import datasets
import pytest

from wanda_lightning.data.source import SHARES
from wanda_lightning.data.sources import open_source

PARAGRAPHS = [f"Paragraph {number} says {number * number}." for number in range(400)]


@pytest.fixture(autouse=True)
def offline_and_quiet(tmp_path, monkeypatch):
    """No hub, and no cache outside the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(source):
    return {split: source.text(split) for split in SHARES}


def paragraphs(text):
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")} - {""}


def write_jsonl(path, documents, field="text"):
    path.write_text("".join(json.dumps({field: document, "id": 1}) + "\n" for document in documents))
    return path


def test_builtin_parts_share_no_paragraph():
    parts = [paragraphs(text) for text in texts(open_source("builtin")).values()]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_builtin_parts_are_all_of_pydoc_topics_and_of_useful_size():
    from pydoc_data.topics import topics

    parts = texts(open_source("builtin"))
    everything = set.union(*(paragraphs(text) for text in topics.values()))
    assert set.union(*(paragraphs(text) for text in parts.values())) == everything
    assert all(len(text) > 80_000 for text in parts.values())
    assert paragraphs(open_source("builtin", whole=True).text("evaluation")) == everything
    assert texts(open_source("builtin")) == parts


@pytest.mark.parametrize("name", ["text.txt", "text.md", "TEXT.TXT"])
def test_a_text_file_is_divided_in_contiguous_parts(tmp_path, name):
    content = "\n\n".join(PARAGRAPHS)
    (tmp_path / name).write_text(content)
    parts = texts(open_source(str(tmp_path / name)))
    assert parts["calibration"] + parts["train"] + parts["evaluation"] == content
    assert [round(10 * len(part) / len(content)) for part in parts.values()] == [3, 4, 3]
    assert all(part.startswith("Paragraph") or part.startswith("\n") for part in parts.values())


def test_a_whole_text_file_is_every_split(tmp_path):
    content = "Ünïcode, no newline, one line " * 10
    (tmp_path / "a b.txt").write_text(content, encoding="utf-8")
    assert set(texts(open_source(str(tmp_path / "a b.txt"), whole=True)).values()) == {content}
    parts = texts(open_source(str(tmp_path / "a b.txt")))
    assert "".join(parts.values()) == content
    assert [len(part) for part in parts.values()] == [90, 120, 90]


def test_half_a_character_of_json_is_replaced_and_two_halves_are_one(tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"text": "cut \\ud83d"}\n{"text": "\\ud83d\\ude00 whole"}\n')
    assert open_source(str(tmp_path / "cut.jsonl"), whole=True).text("train") == "cut \ufffd\n\n\U0001f600 whole"


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_lines_are_joined_with_blank_lines(tmp_path, suffix):
    path = write_jsonl(tmp_path / f"documents.{suffix}", PARAGRAPHS, field="story")
    source = open_source(str(path), text_field="story")
    assert "".join(texts(source).values()) == "\n\n".join(PARAGRAPHS)
    with pytest.raises(ValueError, match=r"line 1 has no text_field 'text', it has story, id"):
        open_source(str(path)).text("train")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("record", [lambda text: {"text": text}, str])
def test_a_json_list_is_taken_as_json_lines_are(tmp_path, record, indent):
    (tmp_path / "list.json").write_text(json.dumps([*map(record, PARAGRAPHS)], indent=indent))
    lines = write_jsonl(tmp_path / "lines.jsonl", PARAGRAPHS)
    assert texts(open_source(str(tmp_path / "list.json"))) == texts(open_source(str(lines)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{oops\n', "line 3 is not JSON"),
        (b'{"text": "a"}\n{"other": "b"}\n', "line 2 has no text_field 'text', it has other"),
        (b'{"text": "a"}\n{"text": 3}\n', "line 2 has neither text nor messages .* in field 'text': 3"),
        (b'{"text": null}\n{"text": null}\n', "null in all 2 records"),
        (b"3\n", "line 1 has no text_field 'text', it is 3"),
        (b"[1, 2]\n", "record 1 has no text_field 'text', it is 1"),
        (b'[{"text": "a"}, {"other": "b"}]', "record 2 has no text_field 'text', it has other"),
        (b'[\n{"text": "a"},\noops]', "begins like a list, is not JSON .*line 3 column 1"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "bad.jsonl")).text("train")


def test_what_is_no_source_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "paper.pdf").write_bytes(b"%PDF")
    texts = ("my text", 100 * "Once upon a time ", 300 * "long" + ".txt")
    for name in ("missing.txt", str(tmp_path / "missing.jsonl"), str(tmp_path / "missing"), "./missing", "", *texts):
        with pytest.raises(ValueError, match="without a hub these work"):
            open_source(name)
    with pytest.raises(ValueError, match=r"paper\.pdf.*no source of text.* folder of a data set.* \.csv or \.parquet"):
        open_source(str(tmp_path / "paper.pdf"))


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_local_folder(tmp_path, on_disk):
    folder = tmp_path / "my data"
    splits = {"train": PARAGRAPHS[:6], "test": PARAGRAPHS[6:8]}
    if on_disk:
        datasets.DatasetDict(
            {split: datasets.Dataset.from_dict({"text": documents}) for split, documents in splits.items()}
        ).save_to_disk(folder)
    else:
        folder.mkdir()
        for split, documents in splits.items():
            write_jsonl(folder / f"{split}.jsonl", documents)
    source = open_source(str(folder))
    source.prepare()
    train = "\n\n".join(splits["train"])
    assert texts(source) == {"calibration": train, "train": train, "evaluation": "\n\n".join(splits["test"])}

    with pytest.raises(ValueError, match=r"no split 'validation', it has train, test"):
        open_source(str(folder), evaluation_split="validation").text("evaluation")
    with pytest.raises(ValueError, match=r"no text_field 'story', it has text"):
        open_source(str(folder), text_field="story").text("train")


def test_one_split_for_both_is_divided(tmp_path):
    datasets.Dataset.from_dict({"text": PARAGRAPHS}).save_to_disk(tmp_path / "rows")
    parts = texts(open_source(str(tmp_path / "rows"), evaluation_split="train"))
    assert "".join(parts.values()) == "\n\n".join(PARAGRAPHS)
    assert all(parts.values())
    whole = open_source(str(tmp_path / "rows"), evaluation_split="train", whole=True)
    assert whole.text("evaluation") == "\n\n".join(PARAGRAPHS)


def test_a_slice_of_a_split(tmp_path):
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "train.jsonl", PARAGRAPHS)
    assert open_source(str(tmp_path / "rows"), train_split="train[:2]").text("train") == "\n\n".join(PARAGRAPHS[:2])


@pytest.mark.parametrize("several", [False, True])
def test_a_slice_of_what_was_saved_to_disk(tmp_path, several):
    rows = datasets.Dataset.from_dict({"text": PARAGRAPHS})
    saved = datasets.DatasetDict({"train": rows, "test": rows}) if several else rows
    saved.save_to_disk(tmp_path / "rows")
    source = open_source(str(tmp_path / "rows"), train_split="train[:2]+train[-1:]", evaluation_split="train[50%:]")
    assert source.text("train") == "\n\n".join(PARAGRAPHS[:2] + PARAGRAPHS[-1:])
    assert source.text("evaluation") == "\n\n".join(PARAGRAPHS[len(PARAGRAPHS) // 2 :])


def test_a_folder_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": "a"}\n{oops\n')
    with pytest.raises(ValueError, match=r"no data set that can be read: .*JSON parse error"):
        open_source(str(tmp_path / "rows")).text("train")


@pytest.mark.parametrize(
    ("rows", "message"), [([1, 2], "neither text nor messages"), ([None, None], "null in all 2 records")]
)
def test_rows_without_text_are_an_error(tmp_path, rows, message):
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "rows")).text("train")


def test_null_is_left_out_and_counted(tmp_path, caplog):
    rows = ["a", None, "", "b", None]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "rows")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    for name in ("rows", "rows.jsonl"):
        caplog.clear()
        assert open_source(str(tmp_path / name), whole=True).text("train") == "a\n\n\n\nb"
        assert "2 of 5 records have null for text" in caplog.text


def test_a_text_file_in_a_folder_is_one_document(tmp_path):
    """As a text file that is named is; the library reads a document a line."""
    (tmp_path / "rows").mkdir()
    for number, text in enumerate(("Two lines\nof one paragraph.\n\nAnother.\n", "A second text.\n")):
        (tmp_path / f"rows/{number}.txt").write_text(text)
    written = "Two lines\nof one paragraph.\n\nAnother.\n\n\nA second text.\n"
    assert open_source(str(tmp_path / "rows")).text("train") == written


def test_words_in_a_csv_file_that_stand_for_nothing_elsewhere_are_words(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.csv").write_text("text,number\nNaN,1\nnull,2\n,3\nNA,\n")
    assert open_source(str(tmp_path / "rows")).text("train") == "NaN\n\nnull\n\nNA"


def test_a_folder_may_be_named_as_a_format_is(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json").mkdir()
    write_jsonl(tmp_path / "json" / "train.jsonl", PARAGRAPHS)
    assert open_source("json").text("train") == "\n\n".join(PARAGRAPHS)


def test_a_folder_never_runs_code(tmp_path):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    with pytest.raises(ValueError, match="no data set that can be read"):
        open_source(str(tmp_path / "evil")).text("train")
    assert not (tmp_path / "evil" / "ran").exists()


@pytest.mark.parametrize("name", ["wikitext2", "c4", "someone/some-data"])
def test_an_unreachable_hub_says_what_works_without(name):
    asked = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}.get(name, name)
    source = open_source(name)
    with pytest.raises(
        ConnectionError, match=rf"'{asked}' could not be reached: .*without a hub these work: \"builtin\""
    ):
        source.text("calibration")


def test_a_failing_download_says_what_works_without(monkeypatch):
    def fail(*args, **kwargs):
        raise FileNotFoundError("Dataset 'x/y' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"'x/y' could not be reached: .*doesn't exist.*without a hub"):
        open_source("x/y").prepare()


def test_wikitext2_preset_joins_as_the_reference_does(monkeypatch):
    rows = {
        "train": ["", " = Title = \n", " Some text . \n"],
        "validation": ["not used"],
        "test": ["", " = Other = \n", " More . \n"],
    }

    def load(path, name=None):
        assert (path, name) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        return datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": text}) for split, text in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("wikitext2")
    assert source.text("calibration") == source.text("train") == " ".join(rows["train"])
    assert source.text("evaluation") == "\n\n".join(rows["test"])


@pytest.fixture
def local_c4(tmp_path, monkeypatch):
    """Shards of C4's own form, streamed from a folder in place of the hub's."""
    (tmp_path / "en").mkdir()
    for split, file, count in (
        ("train", "c4-train.00000-of-01024", 60),
        ("validation", "c4-validation.00000-of-00008", 1150),
    ):
        with gzip.open(tmp_path / "en" / f"{file}.json.gz", "wt") as shard:
            for number in range(count):
                shard.write(json.dumps({"text": f"{split} {number}", "timestamp": "", "url": ""}) + "\n")
    load_dataset = datasets.load_dataset

    def load(path, data_files, **options):
        assert path == "allenai/c4"
        return load_dataset("json", data_files={k: str(tmp_path / v) for k, v in data_files.items()}, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_c4_preset_streams_disjoint_documents(local_c4, monkeypatch):
    source = open_source("c4", seed=1)
    monkeypatch.setattr(source, "train_documents", 20)
    calibration = list(source.text("calibration"))
    assert source.text("train") == " ".join(f"train {number}" for number in range(20))
    assert sorted(calibration) == sorted(f"train {number}" for number in range(20, 60))
    assert calibration == list(source.text("calibration"))
    other = open_source("c4", seed=2)
    monkeypatch.setattr(other, "train_documents", 20)
    assert calibration != list(other.text("calibration"))


def test_c4_preset_evaluates_on_the_first_1100_documents(local_c4):
    source = open_source("c4")
    assert source.text("evaluation") == " ".join(f"validation {number}" for number in range(1100))
    assert source.max_evaluation_windows == 256
