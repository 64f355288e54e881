"""Data that hold conversations: messages with a role and a content, in place of text."""

import copy
import json

import datasets
import pytest
import torch

from wanda_lightning import TextDataModule
from wanda_lightning.data.sources import open_source

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}<eos>\n"
    "{% endfor %}"
)
CONVERSATIONS = [
    [
        {"role": "user", "content": f"What is {number} squared?"},
        {"role": "assistant", "content": f"{number * number}."},
    ]
    for number in range(200)
]
TEXTS = [f"[user] What is {number} squared?<eos>\n[assistant] {number * number}.<eos>\n" for number in range(200)]


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, conversations):
    path.write_text("".join(json.dumps({"id": 1, "messages": each}) + "\n" for each in conversations))
    return str(path)


def test_the_template_makes_text_of_a_file_and_says_where_conversations_end(tmp_path, chat_tokenizer):
    source = open_source(write(tmp_path / "chat.jsonl", CONVERSATIONS), text_field="messages")
    parts = [source.text(split, chat_tokenizer) for split in ("calibration", "train", "evaluation")]
    assert "".join(parts) == "".join(TEXTS)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_data_set_of_conversations(tmp_path, monkeypatch, chat_tokenizer, on_disk):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "chat"
    splits = {"train_sft": CONVERSATIONS[:150], "test_sft": CONVERSATIONS[150:]}
    if on_disk:
        rows = {split: datasets.Dataset.from_dict({"messages": some}) for split, some in splits.items()}
        datasets.DatasetDict(rows).save_to_disk(folder)
    else:
        folder.mkdir()
        for split, some in splits.items():
            write(folder / f"{split.removesuffix('_sft')}.jsonl", some)
    names = ("train_sft", "test_sft") if on_disk else ("train", "test")
    source = open_source(str(folder), text_field="messages", train_split=names[0], evaluation_split=names[1])
    assert source.text("calibration", chat_tokenizer) == "".join(TEXTS[:150])
    assert source.text("evaluation", chat_tokenizer) == "".join(TEXTS[150:])


def test_windows_are_of_the_tokens_of_that_text(tmp_path, chat_tokenizer):
    path = write(tmp_path / "chat.jsonl", CONVERSATIONS)
    data = TextDataModule(path, tokenizer=chat_tokenizer, text_field="messages", sequence_length=32, num_samples=4)
    data.setup()
    ids = torch.cat([batch["input_ids"].flatten() for batch in data.val_dataloader()])
    text = open_source(path, text_field="messages").text("evaluation", chat_tokenizer)
    expected = torch.tensor(chat_tokenizer(text)["input_ids"])
    assert torch.equal(ids, expected[: len(ids)])
    assert len(expected) - len(ids) < 32
    assert int((ids == chat_tokenizer.eos_token_id).sum()) > 10  # one token, not its letters
    assert len(data.calibration_dataloader()) == 4


def test_text_and_empty_conversations_may_stand_between_others(tmp_path, chat_tokenizer):
    path = write(tmp_path / "mixed.jsonl", [CONVERSATIONS[3], "Some text.\n", [], CONVERSATIONS[4]])
    source = open_source(path, text_field="messages", whole=True)
    assert source.text("train", chat_tokenizer) == TEXTS[3] + "Some text.\n" + TEXTS[4]


def test_a_message_may_be_a_call_of_a_tool_alone(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content or m.tool_calls[0].function.name }}\n{% endfor %}"
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]}
    path = write(tmp_path / "chat.jsonl", [[{"role": "user", "content": "What time?"}, call]])
    assert open_source(path, text_field="messages", whole=True).text("train", chat_tokenizer) == "What time?\nclock\n"


def test_parts_that_the_template_cannot_join_are_named(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    path = write(tmp_path / "chat.jsonl", [CONVERSATIONS[0], parts])
    with pytest.raises(ValueError, match=r"document 2: .*chat template does not take this conversation: can only"):
        open_source(path, text_field="messages").text("train", chat_tokenizer)


def test_a_tokenizer_without_a_template_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "chat.jsonl", CONVERSATIONS)
    data = TextDataModule(path, tokenizer=tokenizer, text_field="messages", sequence_length=32)
    with pytest.raises(ValueError, match=r"chat\.jsonl holds conversations, and the tokenizer has no chat template"):
        data.calibration_dataloader()


def test_what_the_template_does_not_take_is_named(tmp_path, chat_tokenizer):
    path = write(tmp_path / "chat.jsonl", [CONVERSATIONS[0], [{"role": "tool", "content": "4"}]])
    with pytest.raises(ValueError, match=r"document 2: .*chat template does not take this conversation: no tools here"):
        open_source(path, text_field="messages").text("train", chat_tokenizer)


@pytest.mark.parametrize("bad", [[{"from": "human", "value": "Hi"}], ["Hi"], {"role": "user", "content": "Hi"}, 3])
def test_other_lists_are_no_conversations(tmp_path, monkeypatch, chat_tokenizer, bad):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    path = write(tmp_path / "rows/chat.jsonl", [bad])
    with pytest.raises(ValueError, match="line 1 has neither text nor messages with role and content in field 'mess"):
        open_source(path, text_field="messages").text("train", chat_tokenizer)
    with pytest.raises(ValueError, match="field 'messages' holds neither text nor messages with role and content"):
        open_source(str(tmp_path / "rows"), text_field="messages").text("train", chat_tokenizer)
