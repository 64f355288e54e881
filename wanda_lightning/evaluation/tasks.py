"""Finding and loading lm-eval's tasks at the start of a run, so that a task that is missing costs no run."""

import math
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from wanda_lightning.arguments import plain
from wanda_lightning.checkpoints.quiet import quiet
from wanda_lightning.evaluation import continuation

DEFAULT_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
WITHOUT_HUB = f'without a hub: tasks: ["{continuation.NAME}"], or task YAMLs with local data files by include_path'


class TaskSet:
    """Tasks with their data, ready to be asked any number of times.

    Args:
        loaded: What lm-eval's ``TaskManager.load`` gave.
    """

    def __init__(self, loaded: dict[str, Any]) -> None:
        self.loaded = loaded
        self._own_fewshot = {name: task.get_config("num_fewshot") for name, task in loaded["tasks"].items()}

    def questions(self, limit: int | float | None = None) -> dict[str, int]:
        """Count the questions of each task that a limit leaves."""
        sizes = {name: len(task.eval_docs) for name, task in self.loaded["tasks"].items()}
        if limit is None:
            return sizes
        return {name: min(size, math.ceil(size * limit) if limit < 1 else int(limit)) for name, size in sizes.items()}

    def prepare(self, num_fewshot: int | None, seed: int) -> None:
        """Set the number of examples in a prompt and seed their choice, as ``lm_eval.simple_evaluate`` does."""
        for name, task in self.loaded["tasks"].items():
            own = self._own_fewshot[name]
            keeps_own = num_fewshot is None or own == 0  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=(own if keeps_own else num_fewshot) or 0)
            task.set_fewshot_seed(seed=seed)

    def forget_requests(self) -> None:
        """Free the prompts and answers of the last evaluation; lm-eval keeps them with the task."""
        for task in self.loaded["tasks"].values():
            task._instances = None


def load_tasks(tasks: Sequence[str] = DEFAULT_TASKS, include_path: str | Sequence[str] | None = None) -> TaskSet:
    """Load tasks of lm-eval with their data.

    Args:
        tasks: Names of tasks, groups or tags, with wildcards; or ``builtin_continuation``.
        include_path: Folders of task YAMLs of your own, which come before lm-eval's.

    Returns:
        The tasks.

    Raises:
        ValueError: If lm-eval is not installed, or there is no such task or folder.
        ConnectionError: If the data of a task can neither be found on this machine nor downloaded.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'zero-shot evaluation needs lm-eval: pip install "wanda-lightning[eval]" ({error})'
        ) from error
    from lightning.pytorch.utilities.seed import isolate_rng

    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ValueError(f"no tasks to evaluate; the default is {', '.join(DEFAULT_TASKS)}")
    given = plain(include_path)  # paths of pathlib become text
    folders = tuple([given] if isinstance(given, str) else given or ())
    for folder in folders:
        if not Path(folder).expanduser().is_dir():
            raise ValueError(f"include_path must be a folder of task YAMLs, {folder!r} is none")
    manager, names = _resolve(names, tuple(str(Path(folder).expanduser()) for folder in folders))
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    with isolate_rng(), quiet("lm_eval.api.task"):
        for name in names:
            for kind, found in _load(name, manager).items():
                loaded[kind] |= found
    return TaskSet(loaded)


def _resolve(names: list[str], folders: tuple[str, ...]) -> tuple[Any, list[str]]:
    """Expand wildcards. lm-eval's own 14,000 tasks take 10 s to list: only if a name is not found without them."""
    # Files that were written since are another key.
    files = tuple((str(file), file.stat().st_mtime_ns) for folder in folders for file in Path(folder).rglob("*.yaml"))
    for defaults in (False, True):
        manager = _manager(folders, files, defaults)
        known = [continuation.NAME, *manager.all_tasks]
        found = {name: [task for task in known if fnmatchcase(task, name)] for name in names}
        # A wildcard may mean lm-eval's tasks too, unless it finds some here already.
        if all(found.values()):
            break
    for name, matches in found.items():
        if not matches:
            raise ValueError(f"lm-eval has no task {name!r}; {_similar(name, known)}{WITHOUT_HUB}")
    return manager, list(dict.fromkeys(task for matches in found.values() for task in matches))


@lru_cache(maxsize=2)
def _manager(folders: tuple[str, ...], files: tuple[tuple[str, int], ...], defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None, include_defaults=defaults)


def _load(name: str, manager: Any) -> dict[str, dict[str, Any]]:
    """Load one task, so that an error can say which it was."""
    from lm_eval.api.task import ConfigurableTask

    if name == continuation.NAME:
        return {"tasks": {name: ConfigurableTask(config=continuation.config())}}
    try:
        found = manager.load([name])
        return {"tasks": found["tasks"], "groups": found["groups"]}
    except Exception as error:  # downloads, data formats and task code fail in as many ways as there are tasks
        kind = (
            ConnectionError if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else ValueError
        )
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise kind(
            f"the zero-shot task {name!r} cannot be loaded{offline}: {str(error).strip() or type(error).__name__}\n"
            f"Nothing was evaluated or pruned. Its data set must be in the local cache or the hub within reach; "
            f"{WITHOUT_HUB}."
        ) from error


def _similar(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}? " if near else ""
