"""How long the command takes to answer help and mistakes: processor time, so that a busy machine does not count.

    python benchmarks/startup.py

Ends with 1 if an answer takes longer than its bound, or has another exit code.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The arguments, the exit code, and the processor seconds that are allowed.
ANSWERS = [
    ("--help", 0, 3),
    ("--version", 0, 3),
    ("prune --help", 0, 5),
    ("fit --help", 0, 5),
    ("inspect --help", 0, 3),
    ("generate --help", 0, 3),
    ("recipes", 0, 3),
    ("prun MODEL", 2, 3),
    ("prune", 2, 3),
    ("prune -c wonda", 2, 3),
    ("prune MODEL --method wonda", 2, 3),
    ("prune MODEL --sparsity half", 2, 3),
    ("validate MODEL --sparsity 0.5", 2, 3),
    ("compare", 2, 3),
    ("inspect", 2, 3),
    ("generate", 2, 3),
]


def answer(line: str, folder: str) -> tuple[int, float, float]:
    """Return the exit code, the processor seconds and the seconds of one command."""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "wanda_lightning", *line.split()]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, spent, seconds


def main() -> None:
    failed = False
    print("| command | exit code | processor s | allowed | s |\n| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for line, expected, allowed in ANSWERS:
            code, spent, seconds = answer(line, folder)
            failed |= code != expected or spent > allowed
            print(f"| wanda-lightning {line} | {code} | {spent:.2f} | {allowed} | {seconds:.2f} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
