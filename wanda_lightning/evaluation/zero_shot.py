"""Zero-shot and few-shot tasks on a model in memory, by lm-eval (the extra ``[eval]``)."""

import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed

from wanda_lightning.arguments import is_whole, plain, whole_number
from wanda_lightning.evaluation.tasks import DEFAULT_TASKS, TaskSet, load_tasks
from wanda_lightning.model.language_model import find_language_model, max_sequence_length
from wanda_lightning.model.modes import in_eval_mode
from wanda_lightning.model.replaced import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The defaults of lm_eval.simple_evaluate: the same examples are drawn for few-shot prompts.
SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}
BOOTSTRAP = 1000  # resamples, for metrics whose standard error has no formula (that of acc has one)


@dataclass(frozen=True)
class ZeroShotResult:
    """What the tasks gave.

    Attributes:
        metrics: By ``task/metric``; standard errors as ``task/metric_stderr``; ``mean/acc`` over all that have ``acc``.
            A group that has a figure of its own gives only that figure.
        details: lm-eval's own results, every task and metric, with versions, settings and seeds; plain JSON types.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items() if not name.endswith("_stderr"))


def evaluate_zero_shot(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str] | TaskSet = DEFAULT_TASKS,
    num_fewshot: int | None = 0,
    limit: int | float | None = None,
    batch_size: int = 8,
    add_special_tokens: bool = False,
    include_path: str | Sequence[str] | None = None,
    max_length: int | None = None,
    log_samples: bool = False,
    progress: bool = False,
    split: bool = True,
) -> ZeroShotResult:
    """Evaluate a model on tasks of lm-eval; the same numbers as ``lm_eval.simple_evaluate``.

    In a distributed run every process must call this; each takes its share of the questions, and all get the result.
    The model, the tokenizer and the random state are left as they were found. No chat template is applied.

    Args:
        model: A causal language model, on its device, or a module that holds one.
        tokenizer: The tokenizer that belongs to it.
        tasks: Names of lm-eval's tasks, groups or tags, with wildcards; ``builtin_continuation``; or what
            :func:`load_tasks` gave. Default: the seven of the Wanda paper.
        num_fewshot: Examples in the prompt, at least 0; None takes each task's own number.
        limit: Questions of each task: the first so many, or a fraction in (0, 1). Default: all.
        batch_size: Sequences in a batch.
        add_special_tokens: Whether the tokenizer may add its special tokens, such as a first ``<s>``.
        include_path: Folders of task YAMLs of your own, which come before lm-eval's.
        max_length: Tokens in a sequence, older ones are cut. Default: the model's limit.
        log_samples: Keep every question and its answer in ``details["samples"]``.
        progress: Show a progress bar, on the first process.
        split: Whether to split the questions over the processes of a distributed run. Must be False where the weights
            are sharded: then all processes do the same work together.

    Returns:
        The metrics, and lm-eval's own results.

    Raises:
        ValueError: If a value is out of range, lm-eval is not installed, there is no such task, an answer is longer
            than a sequence may be, or the tokenizer is none, or has no token that begins a text or ends it.
        ConnectionError: If the data of a task can neither be found on this machine nor downloaded.
    """
    settings = checked_settings(num_fewshot, limit, batch_size, max_length)
    model = cast("PreTrainedModel", find_language_model(model))
    _check_fit(model, tokenizer, settings["max_length"])
    loaded = tasks if isinstance(tasks, TaskSet) else load_tasks(tasks, include_path)
    from lm_eval.evaluator import evaluate

    from wanda_lightning.evaluation.harness import InMemoryLM

    ranks = distributed.get_world_size() if split and distributed.is_initialized() else 1
    if ranks > min(loaded.questions(settings["limit"]).values()):  # lm-eval needs a question for each
        ranks = 1
    with isolate_rng(), _as_found(model, tokenizer), _subdued():
        seed_as_lm_eval()
        loaded.prepare(settings["num_fewshot"], SEEDS["fewshot_seed"])
        sizes = settings["batch_size"], settings["max_length"]
        lm = InMemoryLM(model, tokenizer, *sizes, add_special_tokens, ranks, progress)
        asked = {"limit": settings["limit"], "bootstrap_iters": BOOTSTRAP, "log_samples": log_samples}
        try:
            results = evaluate(lm, loaded.loaded, **asked)
        finally:
            loaded.forget_requests()
    if ranks > 1:  # lm-eval gathers on the first process only
        holder = [results]
        distributed.broadcast_object_list(holder, src=0)
        results = holder[0]
    return ZeroShotResult(_metrics(results), _details(results, settings | {"add_special_tokens": add_special_tokens}))


def checked_settings(
    num_fewshot: int | None, limit: int | float | None, batch_size: int, max_length: int | None
) -> dict[str, Any]:
    """Refuse numbers out of range.

    Args:
        num_fewshot: Examples in the prompt, >= 0, or None.
        limit: Number of questions, >= 1, or a fraction of them in (0, 1), or None.
        batch_size: Sequences in a batch, >= 1.
        max_length: Tokens in a sequence, >= 1, or None.

    Returns:
        The settings by name, as Python's own numbers.

    Raises:
        ValueError: Names the value and what is accepted.
    """
    num_fewshot, limit, batch_size, max_length = map(plain, (num_fewshot, limit, batch_size, max_length))
    if num_fewshot is not None:
        whole_number("num_fewshot", num_fewshot, 0)
    # lm-eval takes 1.0 for one question and rounds 2.5 down.
    if limit is not None and not is_whole(limit, 1) and not (isinstance(limit, float) and 0 < limit < 1):
        raise ValueError(f"limit must be a whole number of at least 1 or a fraction in (0, 1), got {limit!r}")
    whole_number("batch_size", batch_size, 1)
    if max_length is not None:
        whole_number("max_length", max_length, 1)
    return {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size, "max_length": max_length}


def _check_fit(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> None:
    longest = max_sequence_length(model.config)
    if longest is not None and max_length is not None and max_length > longest:
        raise ValueError(f"max_length must be at most {longest}, the model's max_position_embeddings, got {max_length}")
    if not callable(tokenizer):
        raise ValueError(f"tokenizer must be the one that load_tokenizer gives, got {tokenizer!r:.60}")
    if tokenizer.bos_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has neither a bos_token nor an eos_token, and lm-eval needs one: set tokenizer.eos_token"
        )


def seed_as_lm_eval() -> None:
    """Seed all generators as ``lm_eval.simple_evaluate`` does; to be called within ``isolate_rng``."""
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])
    torch.manual_seed(SEEDS["torch_seed"])


@contextmanager
def _as_found(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Undo what lm-eval does to a model and a tokenizer: eval mode, tied weights, padding."""
    padding, has_end = (tokenizer.pad_token, tokenizer.padding_side), tokenizer.eos_token is not None
    try:
        if not has_end:  # lm-eval would add a token to pad with, for good, and could not generate
            tokenizer.eos_token = tokenizer.bos_token
        # Weights are tied already, where they should be.
        with in_eval_mode(model), replaced(model, "tie_weights", lambda *_, **__: None):
            yield
    finally:
        tokenizer.pad_token, tokenizer.padding_side = padding
        if not has_end:
            tokenizer.eos_token = None


@contextmanager
def _subdued() -> Iterator[None]:
    """Keep lm-eval from forking a pool for bootstrap errors (not safe beside CUDA) and from bars of its own."""
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    from wanda_lightning.evaluation.harness import Tqdm

    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with (
            replaced(task, "tqdm", lambda docs, **_: docs),
            replaced(model, "tqdm", lambda texts, **_: texts),
            replaced(huggingface, "tqdm", Tqdm),
        ):
            yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    covered = {child for group in results.get("groups", {}) for child in results["group_subtasks"].get(group, [])}
    metrics: dict[str, float] = {}
    accuracies: list[float] = []
    errors: list[float] = []
    for task, values in results["results"].items():
        if task in covered:
            continue
        for key, value in values.items():
            name, comma, filtered = key.partition(",")
            if not comma or not isinstance(value, int | float) or math.isnan(value):
                continue
            metrics[f"{task}/{name}" + (f"-{filtered}" if filtered != "none" else "")] = float(value)
        if "acc,none" in values:
            accuracies.append(float(values["acc,none"]))
            errors += [metrics[f"{task}/acc_stderr"]] if f"{task}/acc_stderr" in metrics else []
    if accuracies:
        metrics["mean/acc"] = sum(accuracies) / len(accuracies)
        if len(errors) == len(accuracies):  # of questions that were drawn apart
            metrics["mean/acc_stderr"] = math.hypot(*errors) / len(errors)
    return metrics


def _details(results: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return _plain(results) | {
        "settings": settings | SEEDS | {"bootstrap_iters": BOOTSTRAP, "chat_template": False},
        "environment": {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **{package: version(package) for package in ("lm-eval", "transformers", "torch", "datasets")},
        },
    }


def _plain(value: Any) -> Any:
    """Turn what lm-eval returns into plain JSON types; a function becomes its name."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", None) or str(value)
