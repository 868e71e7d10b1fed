"""A worker's process uses the memory of one batch again for the next, instead of asking the system each time."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from planrt.allocator import _SETTINGS, CLEARING
from planrt.plans import func2plan
from planrt.workers import WebsocketClientWorker

SERVE = (
    "import threading\n"
    "from planrt.workers import WebsocketServerWorker\n"
    "def ready(port):\n"
    "    for one in threading.enumerate():\n"
    "        if one.name.endswith('warm-up'):\n"
    "            one.join()\n"  # what it imports takes pages, too
    "    print(port, flush=True)\n"
    "WebsocketServerWorker('bob', threads=1).start(ready=ready)\n"
)
ASK = "from planrt.allocator import keep_freed_memory\nprint(keep_freed_memory())\n"


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


# Memory that others freed

LOOK = """
import sys, torch
from planrt.allocator import clear_new_memory
print(clear_new_memory() if 'clear' in sys.argv else None)
torch.set_num_threads(1)
found = 0
for size in (1, 8, 32, 200, 1_000, 100_000, 3_000_000):
    for _ in range(5 if size > 1000 else 300):
        freed = [torch.full((size,), 3.25) for _ in range(4)]
        del freed
        found += int((torch.empty(size) != 0).sum())  # not the table's, which clears
print(found)
"""


def looked(*words: str, **more: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *words],
        capture_output=True,
        text=True,
        env=environment(**more),
        check=True,
    )
    said, found = done.stdout.split()
    return said, int(found)


def test_memory_that_was_freed_is_cleared_before_anybody_has_it_again():
    assert looked()[1] > 100_000  # without: the test looks in the right place
    assert looked("clear", GLIBC_TUNABLES=CLEARING) == ("True", 0)
    said, found = looked("clear")  # small blocks come from a cache that cannot be told any more
    assert said == "False"
    assert found < 100_000


def began_with(pid: int) -> str:
    """The environment that the system gave to a process, in which glibc has written ends of words for colons."""
    return Path(f"/proc/{pid}/environ").read_text().replace("\0", ":")


def test_the_command_starts_itself_again_where_it_has_users(tmp_path):
    """Its own environment tells, which is what the system gave the process when it began."""
    users = tmp_path / "users.txt"
    users.write_text("ann: a-long-token-of-hers\n")
    users.chmod(0o600)
    for options, clears in ((["--users", str(users)], True), ([], False)):
        command = [sys.executable, "-m", "planrt.fl.serve", "--id", "bob", "--empty", "--port", "0", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
            try:
                while "serves at" not in (line := process.stdout.readline()):
                    assert line, "it ended"
                assert (CLEARING in began_with(process.pid)) == clears
            finally:
                process.kill()


def test_other_tunables_stay(tmp_path):
    users = tmp_path / "users.txt"
    users.write_text("ann: a-long-token-of-hers\n")
    users.chmod(0o600)
    command = [
        sys.executable,
        "-m",
        "planrt.cli",
        "serve",
        "--id",
        "bob",
        "--empty",
        "--port",
        "0",
        "--users",
        str(users),
    ]
    env = environment(GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            while "serves at" not in (line := process.stdout.readline()):
                assert line, "it ended"
            assert f"GLIBC_TUNABLES=glibc.malloc.arena_max=2:{CLEARING}" in began_with(process.pid)
        finally:
            process.kill()


def test_private_data_is_reason_enough():
    """A worker without users: memory is cleared from the first private tensor on."""
    from planrt.workers.machine.state import WorkerState
    from planrt.workers.machine.store import StoredObject

    called = []
    state = WorkerState("bob")
    state.store.when_private = lambda: called.append(True)
    state.store.add(1, StoredObject(torch.ones(1), "s"))
    assert called == []
    for id in (2, 3):
        state.store.add(id, StoredObject(torch.ones(1), "s", frozenset()))
    assert called == [True]
