"""A worker's process uses the memory of one batch again for the next, instead of asking the system each time."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from planrt.plans import func2plan
from planrt.workers import WebsocketClientWorker
from planrt.workers.serving.allocator import _SETTINGS

SERVE = (
    "from planrt.workers import WebsocketServerWorker\n"
    "WebsocketServerWorker('bob', threads=1).start(ready=lambda port: print(port, flush=True))\n"
)
ASK = "from planrt.workers.serving.allocator import keep_freed_memory\nprint(keep_freed_memory())\n"


@func2plan(args_shape=[(-1,)])
def several_megabytes(x):
    a = x + 1
    b = a * 2
    c = b - x
    return (a + b + c).sum()


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _SETTINGS} | more


def faults_of(pid: int) -> int:
    """Pages that the system had to give to a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7])


def faults_per_call(**more: str) -> float:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True, env=environment(**more)
    ) as process:
        try:
            port = int(process.stdout.readline())
            with WebsocketClientWorker("bob", "127.0.0.1", port) as worker:
                x = torch.ones(1_000_000)
                for _ in range(10):
                    worker.run(several_megabytes, x)
                before = faults_of(process.pid)
                for _ in range(20):
                    worker.run(several_megabytes, x)
                return (faults_of(process.pid) - before) / 20
        finally:
            process.kill()


def test_a_served_process_keeps_memory_unless_malloc_is_set_up_otherwise():
    """Four results of 4 MB a call are 4,000 pages, were they new each time; some are, at the edges of what is kept."""
    kept, given_back = faults_per_call(), faults_per_call(MALLOC_TRIM_THRESHOLD_="1048576")
    assert given_back > 2000
    assert kept < given_back / 4


def test_it_says_whether_it_did():
    def said(**more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, env=environment(**more), check=True
        )
        return done.stdout.strip()

    assert said() == "True"
    assert said(GLIBC_TUNABLES="glibc.malloc.check=0") == "False"
