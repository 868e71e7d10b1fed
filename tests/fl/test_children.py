"""Worker processes: they serve, their errors are heard, and none outlives its parent, however that goes."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from planrt.command_line import available_cores
from planrt.errors import ConnectError
from planrt.fl.data.digits import DataSource, find
from planrt.fl.runs import children
from planrt.fl.runs.children import ChildOptions, WorkerProcesses, mnist_children
from planrt.workers import WebsocketClientWorker
from tests import warm
from tests.processes import alive, eventually, write_small_mnist

pytestmark = pytest.mark.usefixtures("warm_workers")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> DataSource:
    return find("mnist", write_small_mnist(tmp_path_factory.mktemp("data") / "small"))


def bob(source: DataSource, port: int = 0) -> ChildOptions:
    return ChildOptions("bob", port, ("--dataset", "mnist", "--data", str(source.folder), "--threads", "1"))


@pytest.fixture
def never(tmp_path, monkeypatch) -> ChildOptions:
    """A worker that waits in its data for as long as the test takes, and never serves."""
    os.mkfifo(tmp_path / "go-on")
    (tmp_path / "waiting.py").write_text(f"def data():\n    open({str(tmp_path / 'go-on')!r}).read()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return ChildOptions("bob", 0, ("--dataset", "waiting:data", "--key", "d", "--threads", "1"))


def test_children_serve_say_what_and_end_with_the_block(source):
    with WorkerProcesses([bob(source)]) as workers:
        ready = workers.wait_ready()["bob"]
        assert (ready.key, ready.images, ready.digits) == ("mnist", 12, {4: 4, 5: 4, 6: 4})
        with WebsocketClientWorker("bob", uri=ready.uri) as client:
            assert client.datasets["mnist"].length == 12
            assert "#mnist" in client.datasets["mnist"].tags
        pid = workers.pids["bob"]
        assert alive(pid)
    assert not alive(pid)


def test_a_childs_own_error_is_heard_and_the_others_stop(source):
    with WorkerProcesses([bob(source), ChildOptions("dora")]) as workers:
        with pytest.raises(ConnectError, match="worker 'dora': no data is meant for worker 'dora'"):
            workers.wait_ready()
        pids = workers.pids.values()
    assert not any(map(alive, pids))


def test_a_taken_port_is_named(source):
    with WorkerProcesses([bob(source)]) as first:
        taken = first.wait_ready()["bob"].port
        message = rf"worker 'bob': cannot listen on ws://127\.0\.0\.1:{taken}"
        with WorkerProcesses([bob(source, port=taken)]) as second, pytest.raises(ConnectError, match=message):
            second.wait_ready()


def test_a_child_killed_before_it_serves_is_named(never):
    with WorkerProcesses([never]) as workers:
        os.kill(workers.pids["bob"], signal.SIGKILL)
        with pytest.raises(ConnectError, match="worker 'bob' ended with exit code -9 before it served"):
            workers.wait_ready()


def test_a_child_that_takes_long_to_end_before_it_serves_is_named(tmp_path, monkeypatch):
    """Its output ends first; the process may be there for seconds yet where the machine is busy."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec >&-\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(children.sys, "executable", str(program))
    monkeypatch.setattr(children, "STOP_GRACE", 0.0)
    with WorkerProcesses([ChildOptions("bob")]) as workers:
        with pytest.raises(ConnectError, match="worker 'bob' ended its output before it served"):
            workers.wait_ready()
        pid = workers.pids["bob"]
    assert not alive(pid)


def test_waiting_for_readiness_is_bounded(never):
    workers = WorkerProcesses([never], ready_timeout=0.0)
    with pytest.raises(ConnectError, match="not ready after 0 s: bob"), workers:
        workers.wait_ready()
    assert not alive(workers.pids["bob"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_stops_the_children(source, error):
    workers = WorkerProcesses([bob(source)])
    with pytest.raises(error), workers:
        raise error
    assert not alive(workers.pids["bob"])


def test_a_child_that_cannot_react_is_killed_after_the_grace(source, monkeypatch):
    monkeypatch.setattr(children, "STOP_GRACE", 0.2)
    with WorkerProcesses([bob(source)]) as workers:
        workers.wait_ready()
        warm.send_signal(workers.pids["bob"], signal.SIGSTOP)
    assert not alive(workers.pids["bob"])


def test_waiting_ends_when_a_child_does(source):
    with WorkerProcesses([bob(source)]) as workers:
        workers.wait_ready()
        os.kill(workers.pids["bob"], signal.SIGKILL)
        with pytest.raises(ConnectError, match="worker 'bob' ended with exit code -9"):
            workers.wait()


PARENT = """
import sys, time
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
options = ("--dataset", "mnist", "--data", sys.argv[1], "--threads", "1")
with WorkerProcesses([ChildOptions("bob", 0, options)]) as workers:
    if sys.argv[2] == "ready":
        workers.wait_ready()
    print(workers.pids["bob"], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["starting", "ready"])
def test_a_child_does_not_outlive_its_parent(source, number, when):
    parent = subprocess.Popen(
        [warm.REAL, "-c", PARENT, str(source.folder), when],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(number)
    assert eventually(lambda: not alive(child))


def test_threads_are_shared_out_so_that_workers_do_not_fight(source):
    cores = available_cores()
    threads = {}
    for child in mnist_children(source):
        threads[child.id] = int(child.options[child.options.index("--threads") + 1])
    training = max(1, cores // 3)
    assert threads == {"alice": training, "bob": training, "charlie": training, "testing": cores}
    assert all("--threads 5" in " ".join(child.options) for child in mnist_children(source, threads=5))


def test_ports_follow_each_other_or_are_free(source):
    assert [child.port for child in mnist_children(source, first_port=8777)] == [8777, 8778, 8779, 8780]
    assert {child.port for child in mnist_children(source)} == {0}
