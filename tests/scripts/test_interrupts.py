"""Ctrl-C and SIGTERM at whatever a command is at: all of its processes are gone, and nobody sees a traceback.

The claim is two seconds; how long it took is printed, and what is asserted is that it ends at all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planrt.fl.data.digits import find
from planrt.fl.runs.children import WorkerProcesses, mnist_children
from planrt.fl.runs.run_folder import Journal
from tests.processes import eventually, marked, write_small_mnist
from tests.scripts.test_commands import QUICK, SERVE, START, TRAIN, Commands, commands, lines_until, named

__all__ = ["commands"]  # the fixture


@pytest.fixture
def python() -> str:
    """Real starts: what is interrupted is the import of torch, or stopped by signals that no launcher passes on."""
    return sys.executable


LIMIT = 30.0
"""Seconds after which a process hangs."""


def gone(commands: Commands, process: subprocess.Popen[str], *signals: int) -> tuple[int, str, str]:
    """Sends the signals, 0.1 s apart, and returns the exit code and what was printed, once all processes are gone.

    Those after the first one are sent until the process ends: two that come before it can look at them are one.
    """
    started = time.monotonic()
    first, *more = signals
    process.send_signal(first)
    for number in more:
        while process.poll() is None and time.monotonic() - started < LIMIT:
            time.sleep(0.1)
            process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT)
    while marked(commands.token):
        assert time.monotonic() - started < LIMIT, "processes left behind"
        time.sleep(0.02)
    print(f"{' '.join(map(str, process.args))}: gone after {time.monotonic() - started:.2f} s")
    assert "Traceback" not in err + out, err
    return process.returncode, out, err


def hanging(commands: Commands, module: str, code: str) -> tuple[str, Path]:
    """A module that says that it is imported, and then runs `code`; returns the path to find it on, and where it says
    so."""
    folder, began = commands.folder / "modules", commands.folder / "began"
    folder.mkdir()
    code = code.replace("BEGINS", f"open({str(began)!r}, 'w').close()")
    (folder / f"{module}.py").write_text(f"import time\n{code}")
    root = str(Path(__file__).parents[2])
    return os.pathsep.join([str(folder), root]), began


SWALLOWS = "while True:\n    try:\n        BEGINS\n        time.sleep(600)\n    except BaseException:\n        pass\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "command",
    [
        [*SERVE, "--id", "alice", "--empty", "--port", "0"],
        ["-m", "planrt", "inspect", "x.plan"],
        [*TRAIN, "--worker", "alice=ws://127.0.0.1:1", "--worker", "testing=ws://127.0.0.1:1"],
    ],
    ids=["serve", "inspect", "run"],
)
def test_while_torch_is_imported(commands, command, number):
    """An import that swallows whatever is raised in it."""
    path, began = hanging(commands, "torch", SWALLOWS)
    process = commands.start(command, PYTHONPATH=path)
    assert eventually(began.exists)
    code, _, err = gone(commands, process, number)
    assert code in (-number, 128 + number)
    assert err in (
        "",
        f"planrt: {'interrupted' if number == signal.SIGINT else 'terminated'}, and ended at once\n",
    )
    assert not (commands.folder / "runs").is_dir() or not list((commands.folder / "runs").iterdir())


@pytest.mark.parametrize("command", [TRAIN, START], ids=["run", "start"])
def test_while_its_children_import_torch(commands, command, tmp_path):
    path, began = hanging(commands, "torch", SWALLOWS)
    small = str(write_small_mnist(tmp_path / "data"))
    ports = ["--port", "28777"] if command == START else []
    process = commands.start([*command, "--data", small, *ports], PYTHONPATH=path)
    assert eventually(began.exists)
    assert eventually(lambda: len(marked(commands.token)) == 5)
    gone(commands, process, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_the_owners_data_are_loaded(commands, number):
    code = "def records():\n" + "".join(f"    {line}\n" for line in SWALLOWS.splitlines())
    path, began = hanging(commands, "clinic", code)
    own = ["--dataset", "clinic:records", "--key", "records", "--port", "0"]
    process = commands.start([*SERVE, "--id", "alice", *own], PYTHONPATH=path)
    assert eventually(began.exists)
    assert gone(commands, process, number)[0] == -number


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(write_small_mnist(tmp_path_factory.mktemp("data") / "small"))


def stopped_run(commands, small, *more):
    """A run with workers of its own, that it waits for in vain: they are stopped, and know nothing of signals."""
    process = commands.start(
        [*TRAIN, "--data", small, *QUICK, "--rounds", "100000", "--run-dir", "run", *more]
    )
    lines_until(process, "Training round 2/")
    for pid in marked(commands.token):
        if pid != process.pid:
            os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)
    return process


def test_while_its_workers_are_stopped_and_then_it_goes_on(commands, small, warm_python):
    commands.python = warm_python  # the workers, which are stopped, are started here
    with WorkerProcesses(mnist_children(find("mnist", small), threads=1)) as processes:
        workers = {worker.id: worker.uri for worker in processes.wait_ready().values()}
        process = commands.start([*TRAIN, *named(workers), *QUICK, "--rounds", "4000", "--run-dir", "run"])
        lines_until(process, "Training round 2/")
        for pid in processes.pids.values():
            os.kill(pid, signal.SIGSTOP)
        try:
            code, out, err = gone(commands, process, signal.SIGINT)
        finally:
            for pid in processes.pids.values():
                os.kill(pid, signal.SIGCONT)
        assert code == 130
        assert err.startswith("mnist_async: interrupted")
        assert "go on:   planrt run --resume run" in out
        done = len(json.loads((commands.folder / "run" / "report.json").read_text())["rounds"])
        assert done >= 2
        ended = commands.run([*TRAIN, *named(workers), "--resume", "run", "--rounds", str(done + 1)])
        assert (ended.code, ended.err) == (0, "")


def test_children_that_are_stopped_go_too_and_a_second_signal_kills_at_once(commands, small):
    code, _, err = gone(commands, stopped_run(commands, small), signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert err == "mnist_async: interrupted, and ended at once\n"


BLOCKED = """
import os, threading
stop = os.fsync

def fsync(file):
    if os.path.exists("block"):
        open("blocked", "w").close()
        threading.Event().wait()
    stop(file)

os.fsync = fsync
"""


def test_while_a_checkpoint_is_written_to_a_disk_that_hangs(commands, small):
    (commands.folder / "modules").mkdir()
    (commands.folder / "modules" / "sitecustomize.py").write_text(BLOCKED)
    path = os.pathsep.join([str(commands.folder / "modules"), str(Path(__file__).parents[2])])
    run = [*TRAIN, "--data", small, *QUICK, "--rounds", "100000", "--run-dir", "run"]
    process = commands.start(run, PYTHONPATH=path)
    lines_until(process, "Training round 2/")
    (commands.folder / "block").touch()
    assert eventually((commands.folder / "blocked").exists)
    code, _, err = gone(commands, process, signal.SIGTERM)
    assert (code, err) == (143, "mnist_async: terminated, and ended at once\n")
    (commands.folder / "block").unlink()
    assert len(Journal(commands.folder / "run").rounds) >= 1


def test_a_program_of_ones_own_that_imports_planrt_keeps_its_ctrl_c(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import planrt, signal, time\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "try:\n    print('here', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('mine')\n"
    )
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "mine\n"
    assert process.returncode == 0
