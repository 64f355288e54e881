"""Zero-shot equals lm-eval's own HFLM, item by item; on tiny models, with local and generated tasks."""

import copy
import json
import os
import random
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_llama
from tokenizers.processors import TemplateProcessing

from wanda_lightning.data.builtin_text import BuiltinText
from wanda_lightning.evaluation import evaluate_zero_shot, load_tasks
from wanda_lightning.evaluation.continuation import questions
from wanda_lightning.evaluation.zero_shot import _metrics

MULTIPLE_CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}", train: "{data}"}}}}
output_type: multiple_choice
test_split: test
training_split: train
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
WHOLE_TEXT = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
metadata: {{version: 1.0}}
"""

GENERATION = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of two task YAMLs and their data, 30 questions."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("sta", "mo", "ri", "ke") for b in ("te", "na", "lo", "x")]
    sentence = lambda count: " ".join(draw.choices(words, k=count))  # noqa: E731
    rows = [
        {
            "question": sentence(draw.randint(2, 9)),
            "choices": [sentence(draw.randint(1, 3)) for _ in range(draw.randint(2, 4))],
            "label": draw.randint(0, 1),
        }
        for _ in range(30)
    ]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(MULTIPLE_CHOICE.format(name="local_choice", data=data))
    (folder / "text.yaml").write_text(WHOLE_TEXT.format(name="local_text", data=data))
    return folder


@pytest.fixture
def model(tokenizer):
    return tiny_llama(vocab_size=len(tokenizer))


def by_lm_eval(model, tokenizer, folder, tasks, add_bos_token=False, **settings):
    """What lm-eval's own function and model class give."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, add_bos_token=add_bos_token)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=1000, **settings)


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_equals_lm_eval_item_by_item(model, tokenizer, folder, num_fewshot):
    expected = by_lm_eval(model, tokenizer, folder, ["local_choice"], num_fewshot=num_fewshot, limit=20)
    for batch_size in (1, 8):
        result = evaluate_zero_shot(
            model,
            tokenizer,
            ["local_choice"],
            num_fewshot=num_fewshot,
            limit=20,
            batch_size=batch_size,
            include_path=str(folder),
            log_samples=True,
        )
        theirs, ours = expected["samples"]["local_choice"], result.details["samples"]["local_choice"]
        assert len(theirs) == len(ours) == 20
        for one, other in zip(theirs, ours, strict=True):
            assert (one["doc_id"], one["prompt_hash"], one["acc"], one["acc_norm"]) == (
                other["doc_id"], other["prompt_hash"], other["acc"], other["acc_norm"],
            )  # fmt: skip
            assert [a[0] for a in one["filtered_resps"]] == pytest.approx(
                [a[0] for a in other["filtered_resps"]], rel=1e-5
            )
        for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            assert result.metrics[f"local_choice/{metric}"] == expected["results"]["local_choice"][f"{metric},none"]
    assert result.metrics["mean/acc"] == result.metrics["local_choice/acc"]
    assert result.metrics["mean/acc_stderr"] == result.metrics["local_choice/acc_stderr"]


def test_the_error_of_a_mean_is_that_of_independent_samples():
    values = {"acc,none": 0.5, "acc_stderr,none": 0.03}, {"acc,none": 0.7, "acc_stderr,none": 0.04}
    metrics = _metrics({"results": dict(zip("ab", values, strict=True))})
    draws = np.random.default_rng(0).normal([0.5, 0.7], [0.03, 0.04], (200_000, 2)).mean(1)
    assert metrics["mean/acc"] == pytest.approx(draws.mean(), rel=1e-3)
    assert metrics["mean/acc_stderr"] == pytest.approx(draws.std(), rel=1e-2)
    values[1]["acc_stderr,none"] = "N/A"
    assert "mean/acc_stderr" not in _metrics({"results": dict(zip("ab", values, strict=True))})


@pytest.mark.parametrize("added", [True, False])
def test_special_tokens_are_added_only_if_asked_for(model, tokenizer, folder, added):
    beginning = copy.deepcopy(tokenizer)  # one that begins every text with a special token, as LLaMA's does
    beginning.bos_token = "<eos>"
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", beginning.bos_token_id)]
    )
    found = [
        evaluate_zero_shot(
            model, each, ["local_choice"], add_special_tokens=added, include_path=str(folder), log_samples=True
        ).details["samples"]["local_choice"]
        for each in (beginning, tokenizer)
    ]
    theirs = by_lm_eval(model, beginning, folder, ["local_choice"], added)["samples"]["local_choice"]
    ours, plain, theirs = ([a[0] for row in rows for a in row["filtered_resps"]] for rows in (*found, theirs))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert (ours == pytest.approx(plain, rel=1e-5)) is not added


def test_a_wildcard_finds_tasks_of_every_kind(model, tokenizer, folder):
    expected = by_lm_eval(model, tokenizer, folder, ["local_text"])["results"]["local_text"]["word_perplexity,none"]
    result = evaluate_zero_shot(model, tokenizer, ["local_*"], include_path=str(folder))
    assert result.metrics["local_text/word_perplexity"] == pytest.approx(expected, rel=1e-6)
    assert "local_choice/acc" in result.metrics
    assert result.metrics["mean/acc"] == result.metrics["local_choice/acc"]  # what has no accuracy is not in the mean


def test_the_model_in_a_module_is_asked(model, tokenizer, folder):
    asked = {"tasks": ["local_choice"], "limit": 3, "include_path": str(folder)}
    inner, outer = (
        evaluate_zero_shot(each, tokenizer, **asked).metrics for each in (model, torch.nn.ModuleDict({"of": model}))
    )
    assert inner == outer


def test_details_are_json_with_versions_and_seeds(model, tokenizer, folder):
    result = evaluate_zero_shot(model, tokenizer, ["local_choice"], limit=0.1, include_path=str(folder))
    details = json.loads(json.dumps(result.details))
    assert details["n-samples"]["local_choice"] == {"original": 30, "effective": 3}
    assert details["versions"]["local_choice"] == 1.0
    assert details["settings"]["fewshot_seed"] == 1234
    assert details["settings"]["limit"] == 0.1
    assert {"lm-eval", "transformers", "torch"} <= details["environment"].keys()


def test_the_right_answer_is_the_likeliest_continuation(model, tokenizer):
    """Against the log-likelihood computed by hand."""
    result = evaluate_zero_shot(model, tokenizer, ["builtin_continuation"], limit=10, log_samples=True)
    right = 0
    for row in questions()[:10]:
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["context"])["input_ids"]
            whole = tokenizer(row["context"] + " " + choice)["input_ids"][-128:]  # the model's limit
            count = len(tokenizer(row["context"] + " " + choice)["input_ids"]) - len(context)
            with torch.no_grad():
                logits = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
            scores.append(sum(logits[t, whole[t + 1]].item() for t in range(len(whole) - 1 - count, len(whole) - 1)))
        right += scores.index(max(scores)) == row["label"]
    assert result.metrics["builtin_continuation/acc"] == right / 10


def test_the_model_is_left_as_found(model, tokenizer, folder):
    model.model.layers[0].train()
    tokenizer.pad_token, before_pad = None, tokenizer.pad_token
    modes = [module.training for module in model.modules()]
    weights = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    try:
        evaluate_zero_shot(model, tokenizer, ["local_choice"], limit=5, include_path=str(folder), num_fewshot=1)
        assert tokenizer.pad_token is None
    finally:
        tokenizer.pad_token = before_pad
    assert [module.training for module in model.modules()] == modes
    assert all(id(p) == weights[n][0] and torch.equal(p, weights[n][1]) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    assert random.getstate() == state[2]
    assert "tie_weights" not in vars(model)


def test_evaluating_again_gives_the_same_and_keeps_nothing(model, tokenizer, folder):
    tasks = load_tasks(["local_choice"], str(folder))
    first = evaluate_zero_shot(model, tokenizer, tasks, num_fewshot=2)
    assert tasks.loaded["tasks"]["local_choice"]._instances is None
    assert evaluate_zero_shot(model, tokenizer, tasks, num_fewshot=2).metrics == first.metrics


def test_bars_only_where_asked_for(model, tokenizer, folder, capfd):
    evaluate_zero_shot(model, tokenizer, ["local_*"], limit=2, include_path=str(folder))
    shown = capfd.readouterr()  # the first time, datasets shows how it reads the files
    assert shown.out == ""
    assert "requests" not in shown.err
    evaluate_zero_shot(model, tokenizer, ["local_*"], limit=2, include_path=str(folder), progress=True)
    shown = capfd.readouterr()
    assert "Zero-shot" in shown.out
    assert "Tokenizing" not in shown.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_fewshot": -1}, "num_fewshot must be a whole number of at least 0, got -1"),
        ({"limit": 0}, "limit must be .* got 0"),
        ({"limit": 1.0}, "limit must be .* got 1.0"),
        ({"limit": 2.5}, "limit must be .* got 2.5"),
        ({"limit": "100"}, "limit must be .* got '100'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"max_length": "64"}, "max_length must be a whole number of at least 1, got '64'"),
        ({"max_length": 129}, "max_length must be at most 128, the model's max_position_embeddings, got 129"),
        ({"max_length": 4, "limit": 2}, r"an answer of \d+ tokens does not fit into sequences of 4: give max_length"),
        ({"tasks": []}, "no tasks to evaluate"),
        ({"include_path": "missing"}, "include_path must be a folder of task YAMLs, 'missing' is none"),
    ],
)
def test_bad_values_are_named(model, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_zero_shot(model, tokenizer, **{"tasks": ["builtin_continuation"], **settings})


def test_numpys_numbers_are_those_of_python(model, tokenizer, folder):
    settings = {"num_fewshot": np.int64(1), "limit": np.int64(3), "batch_size": np.int64(2), "max_length": np.int64(64)}
    result = evaluate_zero_shot(model, tokenizer, ["local_choice"], include_path=str(folder), **settings)
    plain = evaluate_zero_shot(model, tokenizer, ["local_choice"], 1, 3, 2, include_path=str(folder), max_length=64)
    assert result.metrics == plain.metrics


@pytest.mark.parametrize("fewshots", [(0, 2), (2, None), (2, 0)])
def test_examples_in_the_prompt_may_change_between_evaluations(model, tokenizer, folder, fewshots):
    tasks = load_tasks(["local_choice"], str(folder))
    again = [evaluate_zero_shot(model, tokenizer, tasks, number, limit=8, log_samples=True) for number in fewshots][-1]
    fresh = evaluate_zero_shot(
        model, tokenizer, ["local_choice"], fewshots[-1], limit=8, include_path=str(folder), log_samples=True
    )
    prompts = [[row["prompt_hash"] for row in each.details["samples"]["local_choice"]] for each in (again, fresh)]
    assert prompts[0] == prompts[1]


def test_a_folder_of_tasks_may_be_a_path(folder):
    assert list(load_tasks(["local_choice"], folder).questions()) == ["local_choice"]


def test_a_task_that_was_written_since_is_found(model, tokenizer, folder, tmp_path):
    text = (folder / "choice.yaml").read_text()
    for name in ("first", "second", "third"):
        (tmp_path / f"{name}.yaml").write_text(text.replace("local_choice", name))
        assert list(load_tasks([name], str(tmp_path)).questions()) == [name]


def only_bos(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.pad_token = tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize("task", ["local_choice", "local_answer"])
def test_a_tokenizer_without_an_end_gets_no_token(model, tokenizer, folder, tmp_path, task):
    (tmp_path / "answer.yaml").write_text(GENERATION.format(name="local_answer", data=folder / "questions.jsonl"))
    tasks, without = load_tasks([task], [str(folder), str(tmp_path)]), only_bos(tokenizer)
    expected = evaluate_zero_shot(model, tokenizer, tasks, limit=5)
    assert evaluate_zero_shot(model, without, tasks, limit=5).metrics == expected.metrics
    assert (len(without), without.pad_token, without.eos_token) == (len(tokenizer), None, None)


@pytest.mark.parametrize("given", [None, "MODEL"])
def test_what_is_no_tokenizer_is_refused(model, given):
    with pytest.raises(ValueError, match=f"tokenizer must be the one that load_tokenizer gives, got {given!r}"):
        evaluate_zero_shot(model, given, ["builtin_continuation"])


def test_a_tokenizer_without_beginning_and_end_is_refused(model, tokenizer):
    without = only_bos(tokenizer)
    without.bos_token = None
    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        evaluate_zero_shot(model, without, ["builtin_continuation"], limit=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hellaswagg", "no task 'hellaswagg'; did you mean .*hellaswag.*builtin_continuation"),
        ("openbookqa", "the zero-shot task 'openbookqa' cannot be loaded .*HF_HUB_OFFLINE"),
    ],
)
def test_a_task_that_cannot_be_had(name, message):
    """Listing lm-eval's own tasks takes 10 s."""
    with pytest.raises((ValueError, ConnectionError), match=message):
        load_tasks([name])


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r'needs lm-eval: pip install "wanda-lightning\[eval\]"'):
        load_tasks(["builtin_continuation"])


def test_the_builtin_questions_are_fair():
    rows = questions()
    assert len(rows) > 200
    assert rows == questions()
    assert all(len(set(row["choices"])) == 4 and row["context"] for row in rows)
    counts = [sum(row["label"] == label for row in rows) for label in range(4)]
    assert max(counts) < 0.35 * len(rows)
    assert all(len(choice.split()) >= 8 for row in rows for choice in row["choices"] if len(choice) < 80)  # not cut
    text = " ".join(BuiltinText().text("evaluation").split())
    places = [text.index(row["context"]) for row in rows]
    assert 0.3 < sum(places[:50]) / 50 / len(text) < 0.7  # the first ones are from all of the text


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_is_left_as_found(model, tokenizer, folder, monkeypatch, before):
    from lm_eval.api import task

    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    if before is not None:
        monkeypatch.setenv("DISABLE_MULTIPROC", before)
    bar = task.tqdm
    evaluate_zero_shot(model, tokenizer, ["local_choice"], limit=1, include_path=str(folder))
    assert os.environ.get("DISABLE_MULTIPROC") == before
    assert task.tqdm is bar
