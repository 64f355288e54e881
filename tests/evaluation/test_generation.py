"""What a model says, against a loop that asks for one token after another."""

import numpy as np
import pytest
import torch
from helpers import tiny_llama
from transformers import GenerationConfig, PreTrainedTokenizerFast

from wanda_lightning.evaluation.generation import PROMPTS, continue_prompts
from wanda_lightning.runs.generation import generate


def one_by_one(model, tokenizer, prompt: str, tokens: int) -> str:
    """Without a cache and without generate."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture
def model(tokenizer):
    return tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)


def test_the_most_likely_token_each_time(model, tokenizer):
    said = continue_prompts(model, tokenizer, tokens=12)
    assert list(said) == list(PROMPTS)
    assert said == {prompt: one_by_one(model, tokenizer, prompt, 12) for prompt in PROMPTS}
    assert len(set(said.values())) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9},
        {"repetition_penalty": 5.0},  # as of Qwen's models, if less
        {"num_beams": 3, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"no_repeat_ngram_size": 1},
        {"forced_eos_token_id": 5},
        {"do_sample": True, "min_p": 0.1},
        {"stop_strings": ["e"]},
        {"max_time": 1e-9},
    ],
    ids=str,
)
def test_settings_of_the_model_s_files_do_not_count(model, tokenizer, settings, caplog):
    before = continue_prompts(model, tokenizer, ["Sparse"], 8)
    own = model.generation_config = GenerationConfig(**settings, max_length=20, eos_token_id=tokenizer.eos_token_id)
    assert continue_prompts(model, tokenizer, ["Sparse"], 8) == before
    assert model.generation_config is own
    assert not caplog.text


def test_the_space_before_what_is_added_stays(model):
    """LLaMA's tokenizer, whose words begin with their space, decodes a text without the first one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"\u2581the": 0, "\u2581cat": 1, "\u2581sat": 2}, unk_token="\u2581the"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    model.generate = lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[2]])], dim=1)
    assert continue_prompts(model, tokenizer, ["the cat"], 1) == {"the cat": " sat"}


def test_a_text_ends_where_the_context_does(model, tokenizer):
    prompt = "a b c d e f " * 10
    length = len(tokenizer(prompt)["input_ids"])
    assert 128 - 40 < length < 128
    said = continue_prompts(model, tokenizer, [prompt])[prompt]
    assert said == one_by_one(model, tokenizer, prompt, 128 - length)


def test_a_context_without_end(model, tokenizer):
    model.config.max_position_embeddings = -1  # as XLNet's config says it
    assert continue_prompts(model, tokenizer, ["Sparse"], 8) == {"Sparse": one_by_one(model, tokenizer, "Sparse", 8)}


@pytest.mark.parametrize("length", [128, 165])
def test_a_prompt_that_leaves_no_room_is_refused_before_others_are_continued(model, tokenizer, monkeypatch, length):
    monkeypatch.setattr(model, "generate", lambda **_: pytest.fail("a text was continued"))
    prompt = tokenizer.decode(tokenizer("a " * length)["input_ids"][:length])
    with pytest.raises(ValueError, match=rf"a prompt of {length} tokens .* at most 128 tokens in all: shorten 'a a a"):
        continue_prompts(model, tokenizer, ["short", prompt])


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.lm_head.eval()
    state = torch.get_rng_state()
    continue_prompts(model, tokenizer, ["x"], 2)
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prompts", ["one text", ["fine", " "], [3]])
def test_prompts_that_are_none(model, tokenizer, prompts):
    with pytest.raises(ValueError, match="prompts must be a list of texts"):
        continue_prompts(model, tokenizer, prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "nothing"}, "device 'nothing' cannot be used here"),
        ({"dtype": "bf16"}, "dtype must be .* got 'bf16'"),
    ],
)
def test_a_device_or_a_dtype_that_is_none(settings, message):
    with pytest.raises(ValueError, match=message):
        generate("./nothing", **settings)


def test_from_the_folder_of_a_model_or_of_a_run(tiny_model_folder, tokenizer, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(tiny_model_folder)
    said = generate(str(run), ["Sparse"], 5)
    assert said == generate(str(tiny_model_folder), ["Sparse"], np.int64(5))
    assert said == {"Sparse": one_by_one(tiny_llama(vocab_size=len(tokenizer)), tokenizer, "Sparse", 5)}
    with pytest.raises(ValueError, match="tokens must be"):
        generate(str(run), tokens=0)
