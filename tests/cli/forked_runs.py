"""Runs the command line in processes of their own, as often as asked; importing everything, which takes long, once.

Each line of the input is JSON. It asks for a run: its ``arguments`` and ``folder``, how many ``seconds`` a layer takes
longer than it would, so that a signal can hit one, which ``step`` is to crash, ``variables`` of its environment; the
answer is the process id. Or it asks to ``wait`` for a process; the answer is the exit code. What a run says goes to
``output`` in its folder, the layers that it solves to ``solved``. Used by test_crashes.py and test_preempted_job.py.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import transformers  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from wanda_lightning.__main__ import main
from wanda_lightning.cli import lightning_cli  # noqa: F401
from wanda_lightning.engine import journal, loop  # noqa: F401
from wanda_lightning.runs import one_shot


def crashes(*_: object, **__: object) -> None:
    raise RuntimeError("this step crashes")


def slowed_down(seconds: float, solved: Path) -> None:
    prune_layer = loop.prune_layer

    def slow(layer, *args, **kwargs):
        with solved.open("a") as file:
            print(layer.name, file=file)
        time.sleep(seconds)
        return prune_layer(layer, *args, **kwargs)

    loop.prune_layer = slow


def run(
    arguments: list[str], folder: str, seconds: float, step: str | None, variables: dict[str, str] | None = None
) -> None:
    os.environ |= variables or {}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    slowed_down(seconds, Path(folder) / "solved")
    if step is not None:
        setattr(one_shot, step, crashes)
    sys.argv = ["wanda-lightning", *arguments]
    main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            sys.stdin.close()
            run(**request)
            sys.exit(0)
        print(pid, flush=True)
