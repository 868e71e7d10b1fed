"""Start-up: from the command to its first round."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.child import ROOT
from benchmarks.measure import Goal, Row, Sample
from benchmarks.workloads import Size

STARTS_WORKERS = "No workers are running"
READY = "ready after"
FIRST_ROUND = "Training round 1/"


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    first_round, ready, imports = [], [], []
    for _ in range(min(size.repeats, 5)):
        imports.append(_seconds_until_end([sys.executable, "-c", "import torch"]))
        lines = _seconds_of_lines()
        ready.append(lines[READY])
        first_round.append(lines[FIRST_ROUND])
    floor = Sample(tuple(imports))
    return [
        Row(
            "command to first round",
            "s",
            Sample(tuple(first_round)),
            floor,
            "python -c 'import torch', alone",
            Goal(at_most=10.0, absolute=True),
            f"mnist_async with its four worker processes; ready to train after {Sample(tuple(ready)).median:.1f} s",
        )
    ]


def _seconds_until_end(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def _seconds_of_lines() -> dict[str, float]:
    """Seconds from starting the command to each line that counts; it is stopped after the first round.

    Raises:
        RuntimeError: it uses workers that run already, or ends too early.
    """
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "planrt.fl.mnist_async", "--rounds", "1", "--run-dir", folder]
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            for line in process.stdout:
                for mark in (STARTS_WORKERS, READY, FIRST_ROUND):
                    if mark in line:
                        seconds[mark] = time.perf_counter() - began
                if FIRST_ROUND in seconds:
                    break
            process.terminate()
    if len(seconds) < 3:
        raise RuntimeError(
            "mnist_async did not start workers and train a round: do workers run on its ports?"
        )
    return seconds
